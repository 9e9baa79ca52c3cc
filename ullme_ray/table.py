"""The embeddings table, where stages that write it and stages that read it meet: a Delta table of Parquet parts.

Delta has no type for lists of one length, so readers that go by its schema give `embedding` as a list, and those that go by the
parts as an array of D numbers. With `table = deltalake.DeltaTable(path)`, tried with the versions in brackets:

    deltalake (1.6)  table.to_pyarrow_table(), table.to_pyarrow_dataset()                 a list
    pandas (3.1)     table.to_pandas(), pandas.read_parquet(table.file_uris())            a numpy array in each row
    polars (2.1)     polars.scan_parquet(table.file_uris())                               Array(Float32, D)
                     polars.read_delta(path, use_pyarrow=True)                            List(Float32)
    duckdb (2.0)     SELECT ... FROM read_parquet([...table.file_uris()...])              FLOAT[]; cast with ::FLOAT[D]
    pyarrow (26)     pyarrow.parquet.read_table(one of table.file_uris())                 fixed_size_list<float>[D]

Instead of floats, `embed.output.dtype` int8 and binary give all of them bytes from -128 to 127; uint8 and ubinary give bytes
from 0 to 255 by the parts, and 16-bit numbers of the same values by Delta's schema, which has no unsigned type. What they mean
is in vectors.py: `format_of(schema.metadata).decode(...)` makes vectors of what a part holds.
Polars' own Delta reader (`read_delta`, `scan_delta` without use_pyarrow) refuses the parts: it takes no array for a list.
Never read the folder itself: it also holds parts that are not in the table, or no longer.
"""

from __future__ import annotations

import os
import re
import time

from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from ullme_ray.errors import StorageError
from ullme_ray.spec.job import EmbedInputSpec

# deltalake gives a store about 3 s by itself; these are as long as `storage` takes for one that restarts.
_RETRIES = {"max_retries": "1000", "retry_timeout": "40s", "backoff_config.max_backoff": "2s"}
_BROKEN_ANSWER = ("request or response body error", "error reading a body", "error decoding response body")
_READ_ATTEMPTS = 8
PROVENANCE_KEY = b"ullme_ray"  # of a part's schema metadata: JSON that names job, model fingerprint, input file and software


def id_column(spec: EmbedInputSpec) -> str:
    """The name of the id column in the table."""
    return spec.id or "id"


def open_table(path: str) -> DeltaTable:
    """The newest version of the table in folder `path` (absolute or s3://).

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    table = find_table(path)
    if table is None:
        raise StorageError(f"{path} holds no embeddings table yet; run `ullme-ray embed` on this job first")
    return table


def find_table(path: str) -> DeltaTable | None:
    """As `open_table`, but None where there is no table."""
    for attempt in range(1, _READ_ATTEMPTS + 1):
        try:
            return DeltaTable(path, storage_options=delta_options(path))
        except TableNotFoundError:
            return None
        except Exception as error:  # deltalake raises DeltaError, OSError and others for a store that does not answer
            if attempt == _READ_ATTEMPTS or not answer_broke_off(error):
                raise StorageError(
                    f"cannot read the table {path} ({reason_of(error)}); check its address and the credentials"
                ) from error
            time.sleep(min(0.2 * 2**attempt, 4.0))
    raise AssertionError


def answer_broke_off(error: Exception) -> bool:
    """Whether a store's answer ended in its middle, the one passing fault that deltalake does not try again by itself."""
    return any(mark in str(error) for mark in _BROKEN_ANSWER)


def delta_options(path: str) -> dict[str, str]:
    """Options for deltalake, which reads the AWS_* variables itself but wants plain http and a region spelled out."""
    if not path.startswith("s3://"):
        return {}
    options = dict(_RETRIES)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        options["AWS_ENDPOINT_URL"] = endpoint
        options["AWS_ALLOW_HTTP"] = str(endpoint.startswith("http://")).lower()
        if not os.environ.get("AWS_REGION"):
            options["AWS_REGION"] = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
    return options


def reason_of(error: Exception) -> str:
    """In one line: deltalake says what happened first, and why in coloured lines below it."""
    lines = [re.sub(r"\x1b\[\d*m|↳", "", line).strip() for line in str(error).splitlines()]
    return f"{type(error).__name__}: {': '.join(line for line in lines if line)}"[:400]
