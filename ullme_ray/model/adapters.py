"""LoRA adapters of the two passes: which one is in the model is said for each pass, never left standing.

peft's own switches also turn gradients on and off for whole adapters, and an activation checkpoint recomputed later would run
with whatever was switched on last. Here a switch changes nothing but the pass it is for, and a recomputation sees the same one.
"""

from __future__ import annotations

import contextlib
import warnings
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


def inject_lora(backbone: Any, folder: str, name: str) -> None:
    """Adds the LoRA adapter of a PEFT folder to a backbone, in place, under `name`; the adapter must not be in use yet.

    An adapter saved from a model with a head is taken as well: its names have one level more.

    Raises:
        ModelError: it is no LoRA adapter, trains more than LoRA weights, or is of another model.
    """
    import peft
    from peft.utils.save_and_load import load_peft_weights

    try:
        config = peft.PeftConfig.from_pretrained(folder)
        weights = load_peft_weights(folder, device="cpu")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"no PEFT adapter can be loaded from {folder}: {(str(error).splitlines() or [''])[0]}") from error
    if not isinstance(config, peft.LoraConfig) or config.modules_to_save or config.bias != "none":
        raise ModelError(f"the adapter in {folder} is not of LoRA weights alone; merge it into a model, and serve that")
    config.inference_mode = True
    parts = {part for part, _ in backbone.named_modules()}
    state = {_name_in(parts, key): weight for key, weight in weights.items()}
    config.target_modules = sorted({key.partition(".lora_")[0] for key in state})  # as saved they may be named from the head on
    config.exclude_modules = None
    try:
        with warnings.catch_warnings():  # several adapters are what is wanted
            warnings.simplefilter("ignore", UserWarning)
            peft.inject_adapter_in_model(config, backbone, adapter_name=name)
        result: Any = peft.set_peft_model_state_dict(backbone, state, adapter_name=name)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ModelError(
            f"the adapter in {folder} does not fit the served model: {(str(error).splitlines() or [''])[0]}"
        ) from error
    missing = [key for key in result.missing_keys if f".{name}." in key]
    if missing or result.unexpected_keys:
        odd = (missing or result.unexpected_keys)[0]
        raise ModelError(f"the adapter in {folder} is of another model than the served one: {odd} is on one side only")
    backbone.requires_grad_(False).eval()


def _name_in(parts: set[str], key: str) -> str:
    """A weight's name as the backbone alone would give it."""
    key = key.removeprefix("base_model.model.")
    for start in (0, 1):
        name = ".".join(key.split(".")[start:])
        if name.partition(".lora_")[0] in parts:
            return name
    return key
