"""What one training row is: from the keys or columns of a file to a `Pair`, or the reason why it is none.

A reason names no value, so that rows rejected alike can be counted together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ullme_ray.row_files import BadRow

MAX_TEXT_BYTES = 2**20  # of one text in UTF-8: hundreds of times what a model reads

TOO_FEW_NEGATIVES = "has fewer hard negatives than train.negatives_per_query, and other rows' passages may not fill up"
NO_SCORES = "has no teacher scores, which train.objective.distill_weight needs"

_QUERY = ("query", "anchor")
_SCORES = ("scores", "score", "labels", "label")
_PASSAGES = ("positive", "positives", "positive_passages", "negative", "negatives", "negative_passages")
LIST_COLUMNS = ("positives", "negatives", "positive_passages", "negative_passages", "scores", "labels")  # JSON in CSV cells


@dataclass(frozen=True, slots=True)
class Pair:
    """A query with the passages that answer it and, maybe, passages that look as if they did."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    scores: tuple[float, ...] | None = None  # a teacher's, of positives + negatives


class _RejectedError(Exception):
    """Its message is the reason."""


def is_used(column: str) -> bool:
    """Whether a row's value under this name matters here."""
    return column in _QUERY or column in _SCORES or column in _PASSAGES or _is_numbered(column)


def lacks(columns: list[str]) -> str | None:
    """What a table with these columns has nothing for, in words."""
    if not any(name in columns for name in _QUERY):
        return "query (or anchor)"
    if not any(name.startswith("positive") and is_used(name) for name in columns):
        return "positive (or positives)"
    return None


def parse_row(row: Any) -> Pair | str:
    """The row as a Pair, or the reason why it is none.

    Repeated passages count once; a hard negative that is also one of the row's positives is dropped.
    """
    try:
        return _parse(row)
    except _RejectedError as error:
        return str(error)


def _parse(row: Any) -> Pair:
    if isinstance(row, BadRow):
        raise _RejectedError(row.reason)
    if not isinstance(row, dict):
        raise _RejectedError("is not a JSON object")
    queries = [row[name] for name in _QUERY if row.get(name) is not None]
    if len(queries) != 1:
        raise _RejectedError("has both query and anchor" if queries else "has no query")
    query = _text(queries[0], "query")
    positives, negatives = _texts(row, "positive"), _texts(row, "negative")
    if not positives:
        raise _RejectedError("has no positive passage")
    scores = _scores(row, len(positives), len(negatives))
    places: dict[str, int] = {}  # text -> its first place among positives + negatives: a positive goes before a negative
    for place, text in enumerate((*positives, *negatives)):
        places.setdefault(text, place)
    return Pair(
        query,
        tuple(text for text, place in places.items() if place < len(positives)),
        tuple(text for text, place in places.items() if place >= len(positives)),
        None if scores is None else tuple(scores[place] for place in places.values()),
    )


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _RejectedError(f"has a {name} that is not text")
    if not value.strip():
        raise _RejectedError(f"has an empty {name}")
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:
        raise _RejectedError(f"has half a surrogate pair in a {name}, which no tokenizer takes") from None
    if num_bytes > MAX_TEXT_BYTES:
        raise _RejectedError(f"has a {name} of more than {MAX_TEXT_BYTES // 2**20} MiB")
    return value


def _texts(row: dict[str, Any], name: str) -> list[str]:
    """All `positive` or `negative` texts of a row, in the order: singular, plural, numbered, `_passages`."""
    numbered = sorted((key for key in row if key.startswith(name) and _is_numbered(key)), key=lambda k: int(k[len(name) + 1 :]))
    found: list[str] = []
    for key in (name, f"{name}s", *numbered, f"{name}_passages"):
        value = row.get(key)
        if value is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and key.endswith("_passages"):
                text, title = _text(item.get("text"), name), item.get("title")
                item = f"{_text(title, name)} {text}" if title else text
            found.append(_text(item, name))
    return found


def _is_numbered(key: str) -> bool:
    name, _, number = key.partition("_")
    return name in ("positive", "negative") and number.isdecimal() and number.isascii()


def _scores(row: dict[str, Any], num_positives: int, num_negatives: int) -> list[float] | None:
    """One teacher score per passage, or None where the row has none.

    Only differences of scores matter to distillation, so margins m of one positive become the scores 0, -m.
    """
    if row.get("scores") is not None:  # our own name: it must be right
        scores = _numbers(row["scores"])
        if scores is None:
            raise _RejectedError("has scores that are not a list of finite numbers")
        if len(scores) == num_positives + num_negatives:
            return scores
        if not (num_positives == 1 and len(scores) == num_negatives):
            raise _RejectedError("has another number of scores than of passages")
        return [0.0, *(-margin for margin in scores)]
    for name in _SCORES[1:]:  # other data has classes and the like under these names
        value = row.get(name)
        if isinstance(value, float) and num_positives == num_negatives == 1 and math.isfinite(value):
            return [0.0, -value]
        numbers = _numbers(value)
        if numbers is not None and len(numbers) == num_positives + num_negatives:
            return numbers
        if numbers and num_positives == 1 and len(numbers) == num_negatives:
            return [0.0, *(-margin for margin in numbers)]
    return None


def _numbers(value: Any) -> list[float] | None:
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        return None
    try:
        numbers = [float(number) for number in value]
    except OverflowError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
