"""What a stored vector takes and what it is worth, for each way of `embed.output`: `python tests/bench/vectors.py FOLDER`.

FOLDER holds a model. Embeds passages of the built-in data set, asks with others, and prints a Markdown table: bytes a vector
takes in a part (Parquet, its column alone), the share of the ten nearest that stay the ten nearest, and the lowest cosine with
the vector as computed, cut alike. SmolLM2-135M takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile

import numpy as np
import pyarrow as pa

from ullme_ray.embed.parquet import parquet_bytes
from ullme_ray.model.encoder import EncoderSettings, load_encoder
from ullme_ray.pairs import read_sources
from ullme_ray.sample_data import ensure_dataset
from ullme_ray.spec.job import JobSpec, ModelSpec
from ullme_ray.vectors import VectorFormat

FORMATS = {
    "float32": VectorFormat(),
    "mantissa_bits: 10": VectorFormat(mantissa_bits=10),
    "dims: 256": VectorFormat(dims=256),
    "dtype: int8": VectorFormat("int8"),
    "dtype: uint8": VectorFormat("uint8"),
    "dtype: binary": VectorFormat("binary"),
}
TOP = 10


def passages(count: int) -> list[str]:
    """Distinct ones of the built-in data set, in their order there."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"name": "bench", "storage": folder, "model": {"base": "x"}, "dataset": {"name": "aws_api_docs"}}
        job = JobSpec.model_validate({**values, "train": {"data": [{"path": "run:data/train.jsonl"}]}})
        ensure_dataset(job)
        found = dict.fromkeys(text for pair in read_sources(job)[0].pairs for text in pair.positives)
    return list(found)[:count]


def nearest(questions: np.ndarray, corpus: np.ndarray) -> np.ndarray:
    """(Q, TOP) rows of the corpus, in any order."""
    return np.argpartition(-(questions @ corpus.T), TOP, axis=1)[:, :TOP]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--passages", type=int, default=500)
    parser.add_argument("--questions", type=int, default=100)
    args = parser.parse_args()

    spec = ModelSpec(base=args.model, max_tokens=64, dtype="bfloat16")
    encoder = load_encoder(args.model, EncoderSettings.of(spec), spec)
    vectors = encoder.encode(passages(args.passages + args.questions))  # (N, D)
    questions, corpus = vectors[: args.questions], vectors[args.questions :]
    wanted = nearest(questions, corpus)
    print(f"{len(corpus)} passages, {len(questions)} questions, {vectors.shape[1]} numbers a vector\n")
    print("| `embed.output` | bytes a vector | recall@10 | lowest cosine |\n| --- | ---: | ---: | ---: |")
    for name, plain in FORMATS.items():
        form = plain.calibrated(corpus) if plain.is_scaled else plain
        stored = form.encode(corpus)
        size = len(parquet_bytes(pa.table({"embedding": form.to_arrow(stored)}))) / len(corpus)
        read = form.decode(stored)  # (N, D')
        found = nearest(form.cut(questions), read)
        recall = np.mean([len(set(a) & set(b)) / TOP for a, b in zip(wanted.tolist(), found.tolist())])
        cosine = float((form.cut(corpus) * read).sum(axis=1).min())
        print(f"| {name} | {size:,.0f} | {recall:.4f} | {cosine:.6f} |")


if __name__ == "__main__":
    main()
