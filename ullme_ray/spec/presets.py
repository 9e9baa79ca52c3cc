"""The presets of METHOD: named sets of objective values. A job names one and sets single fields over it."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "contrastive_weight": 1.0,
    "generation_weight": 0.0,
    "alignment_weight": 0.0,
    "distill_weight": 0.0,
    "contrastive": "infonce",
    "miner_epsilon": None,
    "negative_margin": None,
    "negative_ratio": None,
    "temperature": 0.05,
    "rep_temperature": 0.1,
    "gen_temperature": 1.0,
    "teacher_temperature": 1.0,
    "generation": "sft",
    "dpo_beta": 0.1,
    "label_smoothing": 0.0,
    "dpo_pairs": "all",
    "reference": "auto",
    "alignment_direction": "rep_gen",
    "detach_gen": True,
    "matryoshka": None,
}
_GRL: dict[str, Any] = _COMMON | {
    "generation_weight": 0.5,
    "generation": "dpo",
    "alignment_weight": 1.0,
    "temperature": 0.1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "cl": _COMMON,
    "sft": _COMMON | {"generation_weight": 1.0},
    "dpo": _COMMON | {"generation_weight": 0.5, "generation": "dpo"},
    "grl": _GRL,
    "genc": _GRL | {"contrastive": "supcon", "miner_epsilon": 0.2, "alignment_direction": "gen_rep", "dpo_pairs": "first"},
}
