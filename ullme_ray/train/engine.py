"""What a training loop needs of an engine, and what all engines share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ullme_ray.model.two_pass import TwoPassModel
from ullme_ray.spec.job import TrainSpec


class ParameterState(NamedTuple):
    """All that the optimizer keeps of one parameter, whole and in float32."""

    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class Engine(Protocol):
    """Gradients are summed over the `backward` calls of a step and averaged over ranks once, by the call with `is_last`."""

    zero_stage: int
    module: TwoPassModel

    @property
    def device(self) -> torch.device: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None: ...

    def set_learning_rate(self, learning_rate: float) -> None: ...

    def step(self) -> float:
        """Updates the weights; returns the norm of the gradient before clipping."""
        ...

    def full_gradients(self) -> dict[str, Tensor]: ...

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained parameter, whole, on the CPU, by its name in `module`; a collective call."""
        ...

    def trained_names(self) -> dict[str, int]:
        """Names of the trained parameters with their sizes, in one order on all ranks."""
        ...

    def parameter_state(self, name: str) -> ParameterState:
        """A collective call."""
        ...

    def set_parameter_state(self, name: str, value: ParameterState, *, steps_done: int) -> None:
        """Takes back what `parameter_state` gave, on any number of ranks and under any ZeRO stage; a collective call."""
        ...


def adamw(parameters: Iterable[Tensor], train: TrainSpec) -> torch.optim.AdamW:
    """The optimizer of METHOD's recipe."""
    return torch.optim.AdamW(
        list(parameters), lr=train.learning_rate, betas=(0.9, 0.999), weight_decay=train.weight_decay, fused=True
    )
