"""ZeRO 0: whole weights, gradients and optimizer on every rank, gradients summed over ranks once per step.

In bfloat16 the chunks' gradients and the ranks' are summed in float32 and AdamW moves float32 master weights; DeepSpeed has no
ZeRO 0 that does either. Cost per trained parameter: 16 bytes, in either dtype.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ullme_ray.model.backbone import DTYPES
from ullme_ray.model.two_pass import TwoPassModel
from ullme_ray.spec.job import JobSpec
from ullme_ray.train.engine import ParameterState, adamw

BUCKET_NUMBERS = 16 * 2**20  # float32 values sent in one all-reduce: 64 MiB


class DataParallelEngine:
    """`train.engine.Engine` without sharding.

    Args:
        module: the model, on the CPU.
        job: the whole job.
        world_size: number of ranks; above 1 the process group must be up.
    """

    zero_stage = 0

    def __init__(self, module: TwoPassModel, job: JobSpec, world_size: int) -> None:
        train = job.train
        assert train is not None
        on_gpu = train.workers.gpus_per_worker > 0
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
        self.module = module.to(self.device)
        self.world_size = world_size
        self.max_grad_norm = train.max_grad_norm
        self._trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        for parameter in self._trained.values():
            parameter.data = parameter.data.to(DTYPES[job.model.dtype])
        # In float32 a master weight is the parameter itself.
        self._masters = {name: _master(parameter) for name, parameter in self._trained.items()}
        self.optimizer = adamw(self._masters.values(), train)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`; the call with `is_last` averages the sum over ranks."""
        loss.backward()
        for name, parameter in self._trained.items():
            master = self._masters[name]
            if master is not parameter and parameter.grad is not None:
                master.grad = parameter.grad.float() if master.grad is None else master.grad.add_(parameter.grad)
                parameter.grad = None
        if is_last:
            for master in self._masters.values():
                if master.grad is None:  # an expert that no token of this rank chose; another rank's may have
                    master.grad = torch.zeros_like(master)
            self._average([master.grad for master in self._masters.values() if master.grad is not None])

    def _average(self, grads: list[Tensor]) -> None:
        if self.world_size == 1:
            return
        buckets: list[list[Tensor]] = [[]]
        for grad in grads:
            if buckets[-1] and sum(g.numel() for g in buckets[-1]) + grad.numel() > BUCKET_NUMBERS:
                buckets.append([])
            buckets[-1].append(grad)
        for bucket in buckets:
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat)
            flat /= self.world_size
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(part.view_as(grad))

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        """Updates the weights; returns the global gradient norm before clipping."""
        masters = list(self._masters.values())
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        if self.max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, self.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for name, parameter in self._trained.items():
            if self._masters[name] is not parameter:
                parameter.data.copy_(self._masters[name].data)
        return float(norm)

    def full_gradients(self) -> dict[str, Tensor]:
        """Every trained parameter's whole gradient, between the last backward and `step`; for tests."""
        return {name: master.grad.clone() for name, master in self._masters.items() if master.grad is not None}

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained parameter in float32, whole, on the CPU."""
        return {name: master.detach().to("cpu", copy=True) for name, master in self._masters.items()}

    def trained_names(self) -> dict[str, int]:
        """Names of the trained parameters with their sizes, in one order on all ranks."""
        return {name: parameter.numel() for name, parameter in self._trained.items()}

    def parameter_state(self, name: str) -> ParameterState:
        """Master weight and moments of one parameter, whole."""
        master = self._masters[name]
        state = self.optimizer.state.get(master, {})
        zero = torch.zeros_like(master)
        return ParameterState(master.detach(), state.get("exp_avg", zero), state.get("exp_avg_sq", zero))

    def set_parameter_state(self, name: str, value: ParameterState, *, steps_done: int) -> None:
        """Takes back what `parameter_state` gave, after `steps_done` steps."""
        master = self._masters[name]
        master.data.copy_(value.weight)
        self._trained[name].data.copy_(value.weight)
        self.optimizer.state[master] = {
            "step": torch.tensor(float(steps_done)),
            "exp_avg": value.exp_avg.to(self.device, copy=True),
            "exp_avg_sq": value.exp_avg_sq.to(self.device, copy=True),
        }


def _master(parameter: torch.nn.Parameter) -> Tensor:
    if parameter.dtype == torch.float32:
        return parameter
    return parameter.detach().float().requires_grad_()
