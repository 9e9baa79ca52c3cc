"""How a table stores vectors: cut, rounded or quantised, as sentence-transformers' `quantize_embeddings` does it; and back.

    float32            4 bytes a number; with `mantissa_bits: 10` about 2 once compressed, and a cosine above 0.999999
    int8, uint8        1 byte a number: 256 steps between the smallest and the largest value of its dimension (the ranges)
    binary, ubinary    1 bit a number: its sign, 8 of them packed into an int8 or uint8

The ranges are measured once per table, on a sample, and kept: by other ranges the same number would mean another value. They
lie in the table's folder, `_calibration/<model>-<dims>.npy`, float32 (2, D), smallest and largest, ready for
`quantize_embeddings(ranges=...)`; and every part carries its own in its metadata, so that a part alone can be read. No torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from ullme_ray import storage
from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedOutputSpec
from ullme_ray.table import PROVENANCE_KEY

SAMPLE_ROWS = 10_000  # vectors that the ranges are measured on
_FOLDER = "_calibration"  # readers of Delta tables and its vacuum leave folders with an underscore alone
_STORED = {"float32": "<f4", "int8": "|i1", "uint8": "|u1", "binary": "|i1", "ubinary": "|u1"}
_FLOAT_BITS = 23  # of a float32's mantissa


@dataclass(frozen=True)
class VectorFormat:
    """What `embed.output` says of vectors, and for int8 and uint8 the ranges that give the stored numbers their meaning."""

    dtype: str = "float32"
    dims: int | None = None  # None: as many as the model makes
    mantissa_bits: int | None = None
    ranges_data: bytes = b""  # float32 (2, D)

    @classmethod
    def of(cls, output: EmbedOutputSpec) -> VectorFormat:
        """As a job asks for it; still without ranges."""
        return cls(output.dtype, output.dims, output.mantissa_bits)

    @property
    def is_scaled(self) -> bool:
        """Whether it needs ranges."""
        return self.dtype in ("int8", "uint8")

    @property
    def is_packed(self) -> bool:
        return self.dtype in ("binary", "ubinary")

    @property
    def least_cosine(self) -> float:
        """Of two encodings of a vector that was computed twice: its last bits may take a number across a step."""
        return {"float32": 1.0, "int8": 0.999, "uint8": 0.999}.get(self.dtype, 0.85)

    @property
    def ranges(self) -> np.ndarray | None:
        """(2, D): the smallest and the largest value of each dimension."""
        return np.frombuffer(self.ranges_data, "<f4").reshape(2, -1) if self.ranges_data else None

    @property
    def stored_type(self) -> np.dtype[Any]:
        return np.dtype(_STORED[self.dtype])

    @property
    def delta_type(self) -> pa.DataType:
        """Type of the column as Delta's schema has it, which knows neither a list's length nor bytes from 0 to 255."""
        return pa.list_(pa.int16() if self.stored_type == np.uint8 else pa.from_numpy_dtype(self.stored_type))

    def cut(self, vectors: np.ndarray) -> np.ndarray:
        """(N, W) float32 of unit length -> (N, D) float32 of unit length: what is stored, before it is quantised.

        Raises:
            EmbedError: the model's vectors are narrower than `dims`.
        """
        vectors = np.asarray(vectors, np.float32)
        if self.dims is None or self.dims == vectors.shape[1]:
            return vectors
        if self.dims > vectors.shape[1]:
            raise EmbedError(
                f"embed.output.dims = {self.dims}, but the model's vectors have {vectors.shape[1]} numbers; "
                f"use {vectors.shape[1]} or fewer"
            )
        return _normalised(vectors[:, : self.dims])

    def calibrated(self, sample: np.ndarray) -> VectorFormat:
        """The same with the ranges of these vectors (N, W); values outside of them will be stored as the nearest in range."""
        assert len(sample), "ranges cannot be measured on nothing"
        kept = self.cut(sample)
        return replace(self, ranges_data=np.stack([kept.min(axis=0), kept.max(axis=0)]).astype("<f4").tobytes())

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """(N, W) float32 of unit length -> what the table stores: (N, D), or (N, D / 8) for bits.

        Raises:
            EmbedError: the model's vectors are narrower than `dims`, or do not fill whole bytes with bits.
        """
        kept = self.cut(vectors)  # (N, D)
        if self.dtype == "float32":
            return kept if self.mantissa_bits is None else _rounded(kept, self.mantissa_bits)
        if self.is_packed:
            if kept.shape[1] % 8:
                raise EmbedError(
                    f"embed.output.dtype = {self.dtype} packs 8 numbers into a byte, and the vectors have {kept.shape[1]}; "
                    f"set embed.output.dims: {kept.shape[1] // 8 * 8}"
                )
            bits = np.packbits(kept > 0, axis=-1)
            return bits if self.dtype == "ubinary" else (bits - 128).astype(np.int8)
        starts, steps = self._scale()
        levels = np.clip(np.floor((kept - starts) / steps), 0, 255)
        return levels.astype(np.uint8) if self.dtype == "uint8" else (levels - 128).astype(np.int8)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """What the table stores -> (N, D) float32 of unit length: the middle of each step, or +1 and -1 for bits."""
        if self.dtype == "float32":
            whole = np.asarray(stored, np.float32)
            return whole if self.mantissa_bits is None else _normalised(whole)  # rounding changed the length a little
        if self.is_packed:
            packed = stored.astype(np.int16) + (128 if self.dtype == "binary" else 0)
            signs = np.unpackbits(packed.astype(np.uint8), axis=-1).astype(np.float32) * 2 - 1  # (N, D)
            return signs / np.float32(np.sqrt(signs.shape[1]))
        starts, steps = self._scale()
        assert self.ranges is not None
        middle = np.where(self.ranges[1] == self.ranges[0], 0, 0.5).astype(np.float32)  # a constant is met, not passed
        levels = stored.astype(np.float32) + (128 if self.dtype == "int8" else 0)
        return _normalised(starts + (levels + middle) * steps)

    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        """The value that level 0 starts at, and the width of a level, per dimension."""
        ranges = self.ranges
        assert ranges is not None, f"{self.dtype} vectors have no meaning without ranges"
        steps = (ranges[1] - ranges[0]) / np.float32(255)
        return ranges[0], np.where(steps == 0, np.float32(1), steps)

    def to_arrow(self, stored: np.ndarray) -> pa.FixedSizeListArray:
        """A column of `encode`'s answer. Built by hand: a two-dimensional numpy column would be a list of any length."""
        flat = np.ascontiguousarray(stored, self.stored_type).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), stored.shape[1])

    def from_arrow(self, column: pa.Array) -> np.ndarray:
        """`encode`'s answer from a column of a part, whatever list type a reader gave it."""
        values = column.flatten().to_numpy(zero_copy_only=False)
        return values.astype(self.stored_type, copy=False).reshape(len(column), -1)

    def token(self) -> dict[str, Any]:
        """All that decides what is stored, for the recipe of a part."""
        ranges = hashlib.sha256(self.ranges_data).hexdigest()[:16] if self.ranges_data else None
        return {"dtype": self.dtype, "dims": self.dims, "mantissa_bits": self.mantissa_bits, "ranges": ranges}

    def provenance(self, width: int) -> dict[str, Any]:
        """For a part's metadata; `width` is that of the stored column. See `format_of`."""
        dims = self.dims or (len(self.ranges_data) // 8 or width * (8 if self.is_packed else 1))
        ranges = base64.b64encode(self.ranges_data).decode() or None
        return {"dtype": self.dtype, "dims": dims, "mantissa_bits": self.mantissa_bits, "ranges": ranges}


def format_of(metadata: Mapping[bytes, bytes] | None) -> VectorFormat:
    """How the vectors of a part are stored, by its schema's metadata; float32 where it does not say."""
    noted = json.loads((metadata or {}).get(PROVENANCE_KEY, b"{}")).get("vectors")
    if noted is None:
        return VectorFormat()
    return VectorFormat(noted["dtype"], noted["dims"], noted["mantissa_bits"], base64.b64decode(noted["ranges"] or ""))


def format_of_table(table: DeltaTable) -> VectorFormat:
    """How a table stores vectors, by its first part: those of one version are all alike. Costs reading a footer."""
    first = next(iter(table.to_pyarrow_dataset().get_fragments()), None)
    return VectorFormat() if first is None else format_of(first.physical_schema.metadata)


def find_ranges(folder: str, fingerprint: str, wanted: VectorFormat) -> VectorFormat | None:
    """The format with the ranges that the table in `folder` has for this model; None while it has none.

    Raises:
        EmbedError: they are damaged.
    """
    path = _ranges_path(folder, fingerprint, wanted)
    try:
        ranges = np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError) as error:
        raise EmbedError(f"{path} cannot be read ({error}); remove it, and the table is embedded anew") from error
    if ranges.ndim != 2 or len(ranges) != 2 or ranges.dtype != np.dtype("<f4") or not np.isfinite(ranges).all():
        raise EmbedError(f"{path} does not hold two rows of float32; remove it, and the table is embedded anew")
    return replace(wanted, ranges_data=ranges.tobytes())


def keep_ranges(folder: str, fingerprint: str, calibrated: VectorFormat) -> VectorFormat:
    """Keeps the ranges in the table's folder, unless another run was faster: then answers with that run's.

    Two runs that still pass each other here each commit a table that is right in itself, for a part's recipe and metadata name
    its ranges; the next run embeds again what has others than those that were kept.
    """
    if (known := find_ranges(folder, fingerprint, calibrated)) is not None:
        return known
    data, ranges = io.BytesIO(), calibrated.ranges
    assert ranges is not None
    np.save(data, ranges)
    storage.write_bytes(_ranges_path(folder, fingerprint, calibrated), data.getvalue())
    return find_ranges(folder, fingerprint, calibrated) or calibrated


def _ranges_path(folder: str, fingerprint: str, wanted: VectorFormat) -> str:
    return storage.join(folder, _FOLDER, f"{fingerprint[:16]}-{wanted.dims or 'all'}.npy")


def _normalised(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths == 0, 1, lengths)).astype(np.float32)


def _rounded(vectors: np.ndarray, bits: int) -> np.ndarray:
    """Mantissas rounded to the nearest with `bits` bits, halves to even; the others are zeros, which compress to nothing."""
    dropped = _FLOAT_BITS - bits
    raw = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
    half_up = (1 << (dropped - 1)) - 1 + ((raw >> dropped) & 1)
    return ((raw + half_up) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).view(np.float32)
