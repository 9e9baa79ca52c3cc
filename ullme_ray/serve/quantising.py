"""Vectors as a client asked for them (`output_dtype`), and as JSON.

int8 and uint8 need ranges. A table measures its own; an answer must mean the same in every request and on every server, so
here they are fixed: from -4 / sqrt(D) to 4 / sqrt(D) in 255 steps, D the vector's dimensions. A number of a unit vector is
1 / sqrt(D) on average, so that is four times the usual size; what lies beyond becomes the nearest step. Back again:
`((level + 0.5) / 255 * 8 - 4) / sqrt(D)` with level 0 to 255, for int8 after adding 128.
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np

OutputDtype = Literal["float32", "int8", "uint8", "binary", "ubinary"]
SPREAD = 4.0


def quantised(vectors: np.ndarray, dtype: OutputDtype) -> np.ndarray:
    """(N, D) float32 of unit length -> (N, D) of `dtype`, or (N, ceil(D / 8)) for bits; missing bits at the end are zero."""
    if dtype == "float32":
        return vectors.astype("<f4", copy=False)
    from ullme_ray.vectors import VectorFormat  # loads Arrow, which the process that listens otherwise does without

    width = vectors.shape[1]
    if dtype in ("binary", "ubinary"):
        return VectorFormat(dtype).encode(np.pad(vectors, ((0, 0), (0, -width % 8))))
    limit = np.full(width, SPREAD / np.sqrt(width), "<f4")
    return VectorFormat(dtype, ranges_data=np.stack([-limit, limit]).tobytes()).encode(vectors)


def as_json(vectors: Any) -> list[str]:
    """Each row as a JSON list. Floats have the fewest digits that give the same float32 back."""
    return [f"[{','.join(row.astype(str).tolist())}]" for row in vectors]


def as_base64(vectors: np.ndarray) -> list[str]:
    """Each row as a JSON string: the little-endian bytes in base64."""
    return [f'"{base64.b64encode(row.tobytes()).decode()}"' for row in vectors]
