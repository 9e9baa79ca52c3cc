"""Which decoder families can be embedders, by experiment: tiny random models of each, loaded as a user's would be.

`python tests/readme.py` writes the table into README.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from grl_reference import PlainEngine, gradient, make_batch, objective, relative_error

from ullme_ray.errors import ModelError
from ullme_ray.model.backbone import check_family, load_backbone, load_causal_lm
from ullme_ray.model.encode import encode_batch, pad_batch
from ullme_ray.model.two_pass import GenerationBatch, build_two_pass, passage_logps
from ullme_ray.spec.job import LoraSpec, ModelSpec
from ullme_ray.train.collate import TrainBatch
from ullme_ray.train.step import backward_step

VOCAB = 128
_COMMON = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB}
_KV = {"num_key_value_heads": 2}
_HEAD = {"head_dim": 8}
# family: (config values, attention backend that `auto` must end with, or the words of its refusal)
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (_COMMON | _KV, "sdpa"),
    "mistral": (_COMMON | _KV, "sdpa"),
    "phi": (_COMMON, "sdpa"),
    "phi3": (_COMMON | _KV, "sdpa"),
    "qwen2": (_COMMON | _KV, "sdpa"),
    "qwen3": (_COMMON | _KV | _HEAD, "sdpa"),
    "gemma": (_COMMON | _KV | _HEAD, "sdpa"),
    "gemma2": (_COMMON | _KV | _HEAD, "eager"),
    "gemma3_text": (_COMMON | _KV | _HEAD, "sdpa"),
    "gpt2": (_GPT2, "sdpa"),
    "gpt_neox": (_COMMON, "sdpa"),
    "olmo2": (_COMMON | _KV, "sdpa"),
    "smollm3": (_COMMON | _KV, "sdpa"),
    "starcoder2": (_COMMON | _KV, "sdpa"),
    "mixtral": (_COMMON | _KV | {"num_local_experts": 2}, "sdpa"),
    "granite": (_COMMON | _KV, "sdpa"),
    "opt": (_COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "sdpa"),
    "cohere": (_COMMON | _KV, "sdpa"),
    "stablelm": (_COMMON | _KV, "eager"),
    "nemotron": (_COMMON | _KV, "eager"),
    "falcon": (_COMMON, "ignores is_causal=False"),
    "bloom": (_COMMON | {"n_head": 4, "n_layer": 2}, "ignores is_causal=False"),
    "gptj": (_GPT2 | {"rotary_dim": 4}, "sdpa"),
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB}, "ignores is_causal=False"),
}


def make_config(family: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **FAMILIES[family][0])
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
    return config


def save_tiny(family: str, folder: Path) -> str:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(make_config(family)).save_pretrained(folder)
    return str(folder)


def outcome(family: str) -> str:
    """The backend that passed, or the refusal."""
    try:
        return check_family(make_config(family), ModelSpec(base=family))
    except ModelError as error:
        return str(error)


@pytest.mark.parametrize("family", [f for f, (_, end) in FAMILIES.items() if end in ("sdpa", "eager")])
def test_family_embeds_alike_in_any_batch_and_scores_causally(family: str, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path)
    spec = ModelSpec(base=folder)
    backbone = load_backbone(folder, spec)
    assert backbone.config._attn_implementation == FAMILIES[family][1]
    ids = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17]]
    for pooling in ("mean", "lasttoken"):
        with torch.inference_mode():
            together = encode_batch(backbone, pad_batch(ids, 0, 0), pooling)
            alone = torch.cat([encode_batch(backbone, pad_batch([row], 0, 0), pooling) for row in ids])
        assert (together * alone).sum(dim=1).min() >= 0.999999
    # The generate pass scores the passage's tokens only: the same sum as token by token from whole logits.
    lm = load_causal_lm(folder, spec)
    batch = pad_batch(ids, 0, 0)
    lengths = [3, 1, 2]
    with torch.inference_mode():
        got = passage_logps(lm, GenerationBatch(batch.input_ids, batch.attention_mask, torch.tensor(lengths)))
        for row, row_ids in enumerate(ids):
            logps = lm(input_ids=torch.tensor([row_ids]), use_cache=False).logits[0].log_softmax(dim=-1)
            first = len(row_ids) - lengths[row]
            total = sum(logps[t - 1, row_ids[t]] for t in range(first, len(row_ids)))
            assert float(got.total[row]) == pytest.approx(float(total), rel=1e-4)
            assert float(got.mean[row]) == pytest.approx(float(total) / lengths[row], rel=1e-4)


@pytest.mark.parametrize("family", [f for f, (_, end) in FAMILIES.items() if end not in ("sdpa", "eager")])
def test_family_that_cannot_attend_both_ways_is_refused_by_name(family: str, tmp_path: Path) -> None:
    words = f"model family {family} .*{FAMILIES[family][1]}"
    with pytest.raises(ModelError, match=words):
        load_backbone(save_tiny(family, tmp_path), ModelSpec(base="x"))
    with pytest.raises(ModelError, match=words):
        check_family(make_config(family), ModelSpec(base="x"))


@pytest.mark.parametrize("family", [f for f, (_, end) in FAMILIES.items() if end in ("sdpa", "eager")])
def test_check_family_agrees_with_loading(family: str) -> None:
    assert outcome(family) == FAMILIES[family][1]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt2", "stablelm", "mixtral"])
def test_family_trains_alike_with_and_without_activation_checkpointing(family: str, tmp_path: Path, tiny_base: str) -> None:
    folder = save_tiny(family, tmp_path)
    lora = LoraSpec(rank=4, alpha=8, dropout=0.0 if family == "mixtral" else 0.3)
    batch = in_vocabulary(make_batch(tiny_base, 4))
    gradients = []
    for checkpointing, chunk_size in ((False, 4), (True, 1)):
        spec = ModelSpec(base=folder, max_tokens=64, lora=lora)
        module = build_two_pass(folder, spec, reference="auto", gradient_checkpointing=checkpointing)
        backward_step(PlainEngine(module), batch, objective("grl"), chunk_size=chunk_size, step=0, seed=0)
        gradients.append(gradient(module))
    assert relative_error(gradients[1], gradients[0]) <= 1e-5


def in_vocabulary(batch: TrainBatch) -> TrainBatch:
    assert batch.generation is not None
    return replace(
        batch,
        queries=replace(batch.queries, input_ids=batch.queries.input_ids % VOCAB),
        passages=replace(batch.passages, input_ids=batch.passages.input_ids % VOCAB),
        generation=replace(batch.generation, input_ids=batch.generation.input_ids % VOCAB),
    )


def test_lora_that_a_family_cannot_have_is_refused_with_a_way_out(tmp_path: Path) -> None:
    folder = save_tiny("mixtral", tmp_path)
    with pytest.raises(ModelError, match=r"model\.lora does not fit model family mixtral: .*set model\.lora\.dropout: 0"):
        build_two_pass(folder, ModelSpec(base=folder, lora=LoraSpec(dropout=0.1)), reference="auto")


def families_table() -> str:
    """The README table, measured anew."""
    lines = ["| family | bidirectional embedding |", "| --- | --- |"]
    for family, (_, end) in FAMILIES.items():
        backend = outcome(family)
        verdict = f"yes, {backend} attention" if backend in ("sdpa", "eager") else f"refused: {end}"
        lines.append(f"| {family} | {verdict} |")
    return "\n".join(lines)


def test_models_loaded_by_several_threads_at_once_are_whole_and_so_are_later_ones(tiny_base: str) -> None:
    """transformers patches its classes while it builds: two builds at once left every later model with untied weights."""
    together = Barrier(4)

    def load(_: int) -> Any:
        together.wait()
        return [load_causal_lm(tiny_base, ModelSpec(base=tiny_base)) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        models = [model for loaded in pool.map(load, range(4)) for model in loaded]
    for model in (*models, load_causal_lm(tiny_base, ModelSpec(base=tiny_base))):
        assert model.lm_head.weight is model.get_input_embeddings().weight
