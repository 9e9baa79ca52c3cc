"""Rows as the bytes of a Parquet file, encoded for what each column holds.

The numbers of a float vector are split into their bytes before zstd sees them, for the high bytes repeat and the low ones do
not; int8 and bits go through a dictionary of at most 256 values; hashes and vectors have no statistics worth their bytes.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

_ROW_GROUP_BYTES = 16 * 2**20  # of values: large enough to read in one request, small enough to hold several in memory
_UNIQUE = ("embedding", "content_hash")  # columns whose values hardly repeat


def parquet_bytes(rows: pa.Table) -> bytes:
    """The whole file, built in memory: an object appears in one put or not at all."""
    leaves = _leaves(rows.schema)
    vectors = [leaf for leaf in leaves if leaf.startswith("embedding.")]
    is_float = bool(vectors) and pa.types.is_floating(rows.schema.field("embedding").type.value_type)
    unique = {leaf for leaf in leaves if leaf.split(".")[0] in _UNIQUE}
    sink = pa.BufferOutputStream()
    pq.write_table(
        rows,
        sink,
        compression="zstd",
        use_dictionary=[leaf for leaf in leaves if leaf not in unique or (leaf in vectors and not is_float)],
        column_encoding=dict.fromkeys(vectors, "BYTE_STREAM_SPLIT") if is_float else None,
        write_statistics=[leaf for leaf in leaves if leaf not in unique],
        row_group_size=max(1024, _ROW_GROUP_BYTES * max(rows.num_rows, 1) // max(rows.nbytes, 1)),
    )
    return bytes(sink.getvalue())


def _leaves(schema: pa.Schema) -> list[str]:
    """Parquet's names of the columns, such as `embedding.list.element`."""
    sink = pa.BufferOutputStream()
    pq.write_metadata(schema, sink)
    columns = pq.read_metadata(pa.BufferReader(sink.getvalue())).schema
    return [columns.column(position).path for position in range(len(columns))]
