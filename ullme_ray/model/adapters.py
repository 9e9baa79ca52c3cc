"""LoRA adapters of the two passes: which one is in the model is said for each pass, never left standing.

peft's own switches also turn gradients on and off for whole adapters, and an activation checkpoint recomputed later would run
with whatever was switched on last. Here a switch changes nothing but the pass it is for, and a recomputation sees the same one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ullme_ray.errors import ModelError
from ullme_ray.model.backbone import unused_modules
from ullme_ray.model.dropout import RowSeeds, replace_dropout
from ullme_ray.model.family import generates
from ullme_ray.spec.job import LoraSpec

ENCODE = "default"  # peft saves an adapter of this name in the folder itself, where every reader looks for it
GENERATE = "generate"


class AdapterSwitch:
    """Chooses the adapter of a pass, in all layers of a model; without adapters it does nothing."""

    def __init__(self, lm: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._layers: list[Any] = [module for module in lm.modules() if isinstance(module, BaseTunerLayer)]
        separate = any(GENERATE in layer.lora_A for layer in self._layers)
        self.generate = GENERATE if separate else ENCODE  # the adapter that generates
        self.current: str | None = ENCODE

    @contextlib.contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Runs a block with one adapter; None runs the base model."""
        before = self.current
        self._set(name)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, name: str | None) -> None:
        if name == self.current:
            return
        self.current = name
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]


def add_lora(lm: Any, lora: LoraSpec, seeds: RowSeeds) -> Any:
    """Wraps a model with LoRA on all its linear layers but the head; everything else is frozen.

    Raises:
        ModelError: peft cannot adapt this family with these settings.
    """
    import peft

    unused = [name for name, _ in lm.named_modules() if name.split(".")[0] in unused_modules(lm)]
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        exclude_modules=unused or None,
        task_type="CAUSAL_LM" if generates(lm.config) else "FEATURE_EXTRACTION",
    )
    try:
        wrapped = peft.get_peft_model(lm, config, adapter_name=ENCODE)
        if lora.adapters == "separate":
            wrapped.add_adapter(GENERATE, config)
    except ValueError as error:  # such as experts held in one tensor, which peft adapts without dropout only
        raise ModelError(
            f"model.lora does not fit model family {lm.config.model_type}: {str(error).splitlines()[0]}; "
            f"set model.lora.dropout: 0, or remove model.lora"
        ) from error
    for name, parameter in wrapped.named_parameters():
        if f".{GENERATE}." in name:  # peft trains the active adapter only
            parameter.requires_grad_(True)
    replace_dropout(wrapped, seeds)
    return wrapped


def merge_lora(lm: Any) -> Any:
    """The model with the adapter that encodes folded into its weights; one without adapters as it is."""
    return lm.merge_and_unload(adapter_names=[ENCODE]) if hasattr(lm, "merge_and_unload") else lm
