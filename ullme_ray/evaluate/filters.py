"""`--where`: which rows of the table a search may find, by the values of its columns.

A filter is `COLUMN OPERATOR VALUE` with =, !=, <, <=, >, >= or `in A, B, C`, such as `service = s3` or `year >= 2020`; several
must all hold. The value is read as the column's type. A row without a value (null) matches nothing but `!=`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ullme_ray.errors import DataError
from ullme_ray.evaluate.table_parts import EMBEDDING_COLUMN, TableRows

_SHAPE = re.compile(r"\s*(?P<column>[^\s=!<>]+)\s*(?P<operator><=|>=|!=|=|<|>|\s+in\s)\s*(?P<value>.*?)\s*", re.S)
_COMPARE = {"=": pc.equal, "!=": pc.not_equal, "<": pc.less, "<=": pc.less_equal, ">": pc.greater, ">=": pc.greater_equal}


@dataclass(frozen=True)
class Filter:
    column: str
    operator: str
    value: str

    def mask(self, values: pa.ChunkedArray) -> np.ndarray:
        """(n,) bool: which of a column's values match."""
        if self.operator == "in":
            wanted = [self._typed(part.strip(), values.type) for part in self.value.split(",")]
            matches = pc.is_in(values, value_set=pa.array([value.as_py() for value in wanted], values.type))
        else:
            matches = _COMPARE[self.operator](values, self._typed(self.value, values.type))
        return np.asarray(pc.fill_null(matches, self.operator == "!=").to_numpy(), bool)

    def _typed(self, text: str, kind: pa.DataType) -> Any:
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1]
        try:
            return pc.cast(pa.scalar(text), kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"--where: {text!r} is no value of the column {self.column}, which holds {kind}") from error


def parse_filter(text: str) -> Filter:
    """One `--where`.

    Raises:
        DataError: it is none.
    """
    found = _SHAPE.fullmatch(text)
    if found is None or not found["value"]:
        raise DataError(f"--where {text!r} is no filter; write COLUMN=VALUE (also !=, <, <=, >, >=) or `COLUMN in A, B`")
    return Filter(found["column"], found["operator"].strip(), found["value"])


def matching_rows(table: TableRows, filters: Sequence[Filter]) -> list[np.ndarray | None]:
    """For each part which of its rows match all filters; costs reading the columns that they name.

    Raises:
        DataError: the table has no such column.
    """
    if not filters:
        return [None] * len(table.parts)
    names = list(dict.fromkeys(filter_.column for filter_ in filters))
    known = [name for name in table.columns.names if name != EMBEDDING_COLUMN]
    for name in names:
        if table.parts and name not in known:
            raise DataError(f"--where: the table has no column {name}; it has {', '.join(known)} (see embed.input.columns)")
    masks: list[np.ndarray | None] = []
    for part in table.parts:
        values = part.to_table(columns=names)
        mask = np.ones(values.num_rows, bool)
        for filter_ in filters:
            mask &= filter_.mask(values.column(filter_.column))
        masks.append(mask)
    return masks
