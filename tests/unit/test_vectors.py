"""Stored vectors: the numbers of sentence-transformers, back again within a step, and ranges that stay with their table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sentence_transformers.util import quantize_embeddings

from ullme_ray.errors import EmbedError
from ullme_ray.spec.job import EmbedOutputSpec
from ullme_ray.table import PROVENANCE_KEY
from ullme_ray.vectors import VectorFormat, find_ranges, format_of, keep_ranges

WIDTH = 24
DTYPES = ("float32", "int8", "uint8", "binary", "ubinary")


def unit_vectors(count: int, seed: int = 0, width: int = WIDTH) -> np.ndarray:
    """Of unit length, with dimensions of unlike size as those of a language model."""
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(count, width)) * np.geomspace(1, 8, width) + np.linspace(-1, 1, width)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def make_format(dtype: str, **keys: object) -> VectorFormat:
    wanted = VectorFormat.of(EmbedOutputSpec.model_validate({"dtype": dtype, **keys}))
    return wanted.calibrated(unit_vectors(500, seed=1)) if wanted.is_scaled else wanted


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_numbers_are_those_of_sentence_transformers(dtype: str) -> None:
    vectors, form = unit_vectors(300), make_format(dtype)
    stored = form.encode(vectors)
    theirs = quantize_embeddings(vectors, precision=dtype, ranges=form.ranges)
    assert stored.dtype == theirs.dtype == form.stored_type
    np.testing.assert_array_equal(stored, theirs)
    if form.is_scaled:
        calibrated = quantize_embeddings(vectors, precision=dtype, calibration_embeddings=unit_vectors(500, seed=1))
        np.testing.assert_array_equal(stored, calibrated)
        assert (stored != quantize_embeddings(vectors, precision=dtype)).any(), "control: other ranges, other numbers"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_dimension_and_no_rows_at_all(dtype: str) -> None:
    vectors = unit_vectors(50)
    vectors[:, 3] = 0.125
    form = VectorFormat(dtype)
    form = form.calibrated(vectors) if form.is_scaled else form
    np.testing.assert_array_equal(form.encode(vectors), quantize_embeddings(vectors, precision=dtype, ranges=form.ranges))
    empty = form.encode(vectors[:0])
    theirs = quantize_embeddings(vectors[:0], precision=dtype, ranges=form.ranges)
    assert (empty.shape, empty.dtype) == (theirs.shape, theirs.dtype)
    assert format_of(metadata(form, empty)).decode(empty).shape == (0, WIDTH)


def metadata(form: VectorFormat, stored: np.ndarray) -> dict[bytes, bytes]:
    return {PROVENANCE_KEY: json.dumps({"vectors": form.provenance(stored.shape[1])}).encode()}


@pytest.mark.parametrize(
    ("dtype", "least"), [("float32", 1.0), ("int8", 0.9999), ("uint8", 0.9999), ("binary", 0.68), ("ubinary", 0.68)]
)
def test_a_reader_gets_the_vector_back_from_the_part_alone(dtype: str, least: float) -> None:
    vectors, form = unit_vectors(300), make_format(dtype)
    stored = form.encode(vectors)
    found = format_of(metadata(form, stored))
    column = form.to_arrow(stored)
    assert column.type == pa.list_(pa.from_numpy_dtype(form.stored_type), stored.shape[1])
    np.testing.assert_array_equal(found.from_arrow(column), stored)
    np.testing.assert_array_equal(found.from_arrow(column.cast(form.delta_type)), stored)
    back = found.decode(stored)
    assert (back.shape, back.dtype) == (vectors.shape, np.float32)
    np.testing.assert_allclose(np.linalg.norm(back, axis=1), 1, rtol=1e-5)
    cosines = (back * vectors).sum(axis=1)
    assert np.median(cosines) >= least - 1e-6
    assert (back * vectors[::-1]).sum(axis=1).mean() < 0.7 * cosines.mean(), "control: another row's vector"
    if form.is_packed:
        np.testing.assert_array_equal(back > 0, vectors > 0)
    np.testing.assert_array_equal(form.encode(back) if form.is_packed else stored, stored)


def test_a_step_is_met_in_its_middle() -> None:
    """Every value is within half a step; sentence-transformers' way back, to its lower end, is up to a whole one off."""
    vectors, form = unit_vectors(2000), make_format("uint8")
    assert form.ranges is not None
    low, high = form.ranges
    inside = ((vectors >= low) & (vectors <= high)).all(axis=1)
    steps = (high - low) / 255
    starts, widths = form._scale()
    middle = starts + (form.encode(vectors) + 0.5) * widths
    assert inside.sum() > 500
    assert (np.abs(middle - vectors)[inside] <= 0.5001 * steps).all()
    assert (np.abs(middle - 0.5 * widths - vectors)[inside] > 0.75 * steps).any()


def test_dims_are_cut_and_brought_to_unit_length() -> None:
    vectors, form = unit_vectors(30), VectorFormat(dims=8)
    stored = form.encode(vectors)
    expected = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(stored, expected, rtol=1e-6)
    assert not np.allclose(stored, vectors[:, :8])
    np.testing.assert_array_equal(form.encode(vectors)[0], form.cut(vectors[:1])[0])
    with pytest.raises(EmbedError, match=r"embed.output.dims = 32, but the model's vectors have 24 numbers; use 24 or fewer"):
        VectorFormat(dims=32).encode(vectors)
    with pytest.raises(EmbedError, match=r"packs 8 numbers into a byte, and the vectors have 23; set embed.output.dims: 16"):
        VectorFormat("binary").encode(vectors[:, :23])
    scaled = VectorFormat("int8", dims=8).calibrated(vectors)
    assert scaled.ranges is not None
    assert scaled.ranges.shape == (2, 8)
    assert scaled.encode(vectors).shape == (30, 8)


@pytest.mark.parametrize("bits", [1, 7, 10, 16, 22])
def test_mantissas_are_rounded_to_the_nearest_with_halves_to_even(bits: int) -> None:
    vectors, form = unit_vectors(300), VectorFormat(mantissa_bits=bits)
    stored = form.encode(vectors)
    assert (stored.view(np.uint32) & ((1 << (23 - bits)) - 1)).max() == 0
    mantissas, exponents = np.frexp(vectors.astype(np.float64))
    expected = np.ldexp(np.rint(np.ldexp(mantissas, bits + 1)), exponents - bits - 1)  # rint takes halves to even
    np.testing.assert_array_equal(stored, expected.astype(np.float32))
    halves = np.array([[1 + 2.0**-10, 1 + 3 * 2.0**-10, -1 - 2.0**-10, 0.0]], np.float32)  # between two numbers of 9 bits
    np.testing.assert_array_equal(VectorFormat(mantissa_bits=9).encode(halves), [[1.0, 1 + 2 * 2.0**-9, -1.0, 0.0]])


def test_ten_bits_keep_the_cosine_and_few_bits_do_not() -> None:
    vectors = unit_vectors(300, width=256)

    def loss(bits: int) -> float:
        stored = VectorFormat(mantissa_bits=bits).encode(vectors).astype(np.float64)
        return 1 - ((stored * vectors).sum(axis=1) / np.linalg.norm(stored, axis=1)).min()

    assert loss(10) < 1e-6
    form = VectorFormat(mantissa_bits=4)
    np.testing.assert_allclose(np.linalg.norm(form.decode(form.encode(vectors)), axis=1), 1, rtol=1e-6)
    assert loss(2) > 1e-4, "control: a cosine that sees rounding"


def test_ranges_are_kept_with_the_table_and_the_first_ones_win(tmp_path: Path) -> None:
    folder, model = str(tmp_path / "table"), "f" * 64
    wanted = VectorFormat("int8")
    assert find_ranges(folder, model, wanted) is None
    first, second = wanted.calibrated(unit_vectors(100, seed=1)), wanted.calibrated(unit_vectors(100, seed=2))
    assert keep_ranges(folder, model, first) == first
    assert keep_ranges(folder, model, second) == first != second
    assert find_ranges(folder, model, wanted) == first
    assert find_ranges(folder, "0" * 64, wanted) is None
    assert find_ranges(folder, model, VectorFormat("int8", dims=8)) is None
    np.testing.assert_array_equal(np.load(tmp_path / "table" / "_calibration" / f"{'f' * 16}-all.npy"), first.ranges)
    for damaged in (b"", b"\x93NUMPY", (tmp_path / "table" / "_calibration" / f"{'f' * 16}-all.npy").read_bytes()[:-4]):
        (tmp_path / "table" / "_calibration" / f"{'f' * 16}-all.npy").write_bytes(damaged)
        with pytest.raises(EmbedError, match=r"cannot be read .*; remove it, and the table is embedded anew"):
            find_ranges(folder, model, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_vector_computed_twice_is_told_from_another_one(dtype: str) -> None:
    vectors, form = unit_vectors(300, width=256), VectorFormat(dtype)
    form = form.calibrated(vectors) if form.is_scaled else form
    noise = np.random.default_rng(5).normal(size=vectors.shape) * 2e-4  # of a bfloat16 model
    again = (vectors + noise).astype(np.float32)
    again /= np.linalg.norm(again, axis=1, keepdims=True)
    first, second = form.decode(form.encode(vectors)), form.decode(form.encode(again))
    assert (first * second).sum(axis=1).min() > min(form.least_cosine, 0.9999)
    assert (first * second[::-1]).sum(axis=1).max() < form.least_cosine, "control: another row's vector"


def test_whatever_changes_what_is_stored_changes_the_token() -> None:
    formats = [
        VectorFormat(),
        VectorFormat(dims=8),
        VectorFormat(mantissa_bits=10),
        VectorFormat("binary"),
        VectorFormat("ubinary"),
        VectorFormat("int8").calibrated(unit_vectors(9, seed=1)),
        VectorFormat("int8").calibrated(unit_vectors(9, seed=2)),
        VectorFormat("uint8").calibrated(unit_vectors(9, seed=1)),
    ]
    assert len({json.dumps(form.token()) for form in formats}) == len(formats)
    assert json.dumps(formats[5].token()) == json.dumps(VectorFormat("int8").calibrated(unit_vectors(9, seed=1)).token())


def test_a_part_that_says_nothing_holds_float32() -> None:
    assert format_of(None) == format_of({}) == format_of({PROVENANCE_KEY: b'{"fingerprint": "f"}'}) == VectorFormat()
