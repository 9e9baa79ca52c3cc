"""A Llama of a published shape with random weights, for speed alone: `python tests/random_llama.py FOLDER [--shape 1b]`.

Speed does not depend on the weights' values, and this needs neither a hub nor a download. The vocabulary is learned from the
built-in data set and is smaller than the published one; the embedding matrix, which the cost model leaves out, is smaller too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

# hidden_size, intermediate_size, layers, heads, key-value heads of Llama-3.2-1B and Llama-3-8B
SHAPES = {"1b": (2048, 8192, 16, 32, 8), "8b": (4096, 14336, 32, 32, 8)}


def make_llama(folder: Path, shape: str, *, dtype: str = "bfloat16") -> None:
    """Writes an ordinary transformers folder; the weights are drawn on the GPU where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.pairs import read_sources
    from ullme_ray.sample_data import ensure_dataset
    from ullme_ray.spec.job import JobSpec, ScratchSpec

    with tempfile.TemporaryDirectory() as work:
        job = JobSpec.model_validate(
            {
                "name": "texts",
                "storage": work,
                "model": {"base": "scratch"},
                "dataset": {"name": "aws_api_docs"},
                "train": {"data": [{"path": "run:data/train.jsonl"}]},
            }
        )
        ensure_dataset(job)
        texts = [text for pair in read_sources(job)[0].pairs for text in (pair.query, *pair.positives)]
        build_scratch(texts, ScratchSpec(layers=1), max_tokens=2048, seed=0, folder=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    hidden_size, intermediate_size, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    args = parser.parse_args()
    make_llama(args.folder, args.shape)
