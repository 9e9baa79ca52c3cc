"""The trained embedder as an ordinary sentence-transformers folder.

It must load, with equal vectors, in SentenceTransformer and AutoModel of current and older stacks. What older ones need:
module paths of sentence-transformers 3 to 5, the verbose pooling schema, a plain tokenizer class. What none of them tells: a
transformers older than 5.2 ignores `is_causal: false` and computes causal vectors in silence, hence probe.json and the check
in the model card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from ullme_ray.model.encoder import _POOLING_KEYS, PROBE_FILE, Encoder, EncoderSettings, load_encoder
from ullme_ray.model.family import generates, kind_of
from ullme_ray.spec.job import JobSpec, ModelSpec

_MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
_PROBE_TEXTS = (
    "How do I make a bucket private?",
    "An embedding is a vector whose direction holds what a text is about.",
    "42",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 日本語のテキスト",
)


def export_encoder(backbone: Any, tokenizer: Any, job: JobSpec, folder: str, *, training: dict[str, Any]) -> Encoder:
    """Writes the export to a local folder, reads it back, and stores probe vectors.

    Args:
        backbone: the model without its head, LoRA merged, on the CPU.
        tokenizer: the transformers tokenizer.
        job: gives pooling, prompts, length and dtype.
        folder: an empty local folder.
        training: facts for the model card (objective, steps, ...).

    Returns:
        The encoder as loaded from the written folder.

    Raises:
        ModelError: the folder cannot be read back as an embedder.
    """
    settings = EncoderSettings.of(job.model)
    decoder = generates(backbone.config)
    if decoder:  # transformers >= 5.2 then attends both ways without being asked at each call
        backbone.config.is_causal = False
    try:
        backbone.save_pretrained(folder)
    finally:
        if decoder:
            backbone.config.is_causal = True
    tokenizer.save_pretrained(folder)
    _plain_tokenizer_class(folder, settings.max_tokens)
    dim = int(backbone.config.get_text_config().hidden_size)
    _write_json(folder, "modules.json", _MODULES)
    _write_json(folder, "sentence_bert_config.json", {"max_seq_length": settings.max_tokens, "do_lower_case": False})
    _write_json(
        folder,
        "config_sentence_transformers.json",
        {
            "prompts": {
                "query": settings.query_prompt,
                "passage": settings.passage_prompt,
                "document": settings.passage_prompt,
            },
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    pooling: dict[str, Any] = {"word_embedding_dimension": dim, "include_prompt": False}
    pooling |= {key: mode == settings.pooling for mode, key in _POOLING_KEYS.items()}
    pooling |= {"pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False}
    _write_json(folder, "1_Pooling/config.json", pooling)
    os.makedirs(os.path.join(folder, "2_Normalize"), exist_ok=True)
    _write_json(folder, "2_Normalize/config.json", {})

    encoder = load_encoder(folder, settings, _export_spec(job.model), device="cpu")
    _write_probe(encoder, folder)
    with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as stream:
        stream.write(_model_card(job, backbone.config, encoder.fingerprint, training))
    return encoder


def _export_spec(model: ModelSpec) -> ModelSpec:
    return model.model_copy(update={"lora": None})


def _plain_tokenizer_class(folder: str, max_tokens: int) -> None:
    """`TokenizersBackend` is unknown before transformers 5; `PreTrainedTokenizerFast` loads in both."""
    path = os.path.join(folder, "tokenizer_config.json")
    with open(path, encoding="utf-8") as stream:
        config = json.load(stream)
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config |= {"model_max_length": max_tokens, "padding_side": "right"}
    _write_json(folder, "tokenizer_config.json", config)


def _write_json(folder: str, name: str, content: Any) -> None:
    path = os.path.join(folder, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def _write_probe(encoder: Encoder, folder: str, texts: Sequence[str] = _PROBE_TEXTS) -> None:
    entries = [
        {"prompt": prompt, "text": text, "embedding": [round(float(x), 7) for x in encoder.encode([text], prompt)[0]]}
        for prompt in ("query", "passage")
        for text in texts
    ]
    _write_json(folder, PROBE_FILE, {"fingerprint": encoder.fingerprint, "entries": entries})


def _model_card(job: JobSpec, config: Any, fingerprint: str, training: dict[str, Any]) -> str:
    model, kind = job.model, kind_of(config)
    attention = "Attention goes both ways, as this family always has it."
    if kind == "decoder":
        attention = (
            "Attention goes both ways (`is_causal: false` in config.json), which needs **transformers >= 5.2**: an older one\n"
            "computes wrong vectors silently."
        )
    facts = "\n".join(f"| {key} | {value} |" for key, value in training.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, feature-extraction, ullme, grl]
---

# {job.name}

A text embedder made from the {kind} `{model.base}` with ullme_ray, an implementation of ULLME (arXiv 2408.03402).
{attention}

| | |
| --- | --- |
| vector | {config.get_text_config().hidden_size} numbers, unit length, cosine similarity |
| pooling | {model.pooling} over the text's own tokens, prompt left out |
| longest text | {model.max_tokens} tokens |
{facts}
| fingerprint | `{fingerprint}` |

Check your installation in three lines; it prints a number close to 1 (at least 0.999) when this model's vectors come out right:

```python
import json; from sentence_transformers import SentenceTransformer; m = SentenceTransformer(path := ".")
probe = json.load(open(f"{{path}}/probe.json"))["entries"]
print(min(float(m.encode(e["text"], prompt_name=e["prompt"]) @ e["embedding"]) for e in probe))
```
"""
