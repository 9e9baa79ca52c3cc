"""The only place that knows DeepSpeed: an engine whose gradient is reduced over ranks once per step, under ZeRO 1 to 3.

Trap: with several `backward` calls in a step, plain DeepSpeed reduces at each call, and the result is silently wrong under
ZeRO 1 and 2 (cosine 0.68 with the true gradient); the reduction is therefore held back until the last call.
"""

from __future__ import annotations

import contextlib
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

from ullme_ray.model.two_pass import TwoPassModel
from ullme_ray.spec.job import JobSpec
from ullme_ray.train.engine import ParameterState, adamw

# On a CPU DeepSpeed would compile a shared-memory all-reduce at first use: half a minute, a C++ compiler, and ranks that must
# share one host. gloo does without all three.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_config(job: JobSpec, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config for a job; what it does not hold is left to DeepSpeed's defaults."""
    assert job.train is not None
    settings, dtype = job.train.deepspeed, job.model.dtype
    on_gpu = job.train.workers.gpus_per_worker > 0
    zero: dict[str, Any] = {"stage": settings.zero_stage, "overlap_comm": False}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if settings.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": job.train.global_batch_size // world_size,  # not used: chunking is ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job.train.max_grad_norm,  # always written: DeepSpeed's default clips to 1.0
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is fused on the CPU too, and needs no compiler
        "bf16": {"enabled": dtype == "bfloat16"},
        # Sums over chunks and over ranks in float32, whatever the dtype of the weights.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """`train.engine.Engine` on DeepSpeed; the process group must be up.

    Args:
        module: the model, on the CPU, in the dtype of the job.
        job: the whole job.
        world_size: number of ranks.
    """

    def __init__(self, module: TwoPassModel, job: JobSpec, world_size: int) -> None:
        train = job.train
        assert train is not None
        self.module = module
        self.zero_stage: int = train.deepspeed.zero_stage
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=adamw(self._trained.values(), train),
            config=engine_config(job, world_size),
            dist_init_required=False,
        )

        # Gradients stay on their rank, whole, until the last chunk. Two exceptions: the optimizer of ZeRO 1 in bfloat16 does so
        # by itself, and ZeRO 3 in bfloat16 would sum the chunks in bfloat16; there each chunk is reduced, and summed in fp32.
        sharded_bf16 = self.zero_stage == 3 and job.model.dtype == "bfloat16"
        self._reduces_once = hasattr(self._engine.optimizer, "_coalesce_grad_reduction") and not sharded_bf16
        self._held_back: contextlib.ExitStack | None = None

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`; the call with `is_last` averages the sum over ranks."""
        if not self._reduces_once:
            self._engine.set_gradient_accumulation_boundary(is_last)
            self._engine.backward(loss)
            return
        if self._held_back is None:
            self._held_back = contextlib.ExitStack()
            self._engine.set_gradient_accumulation_boundary(True)  # what holds again once the block is left
            self._held_back.enter_context(self._engine.coalesce_grad_reduction())
        self._engine.backward(loss)
        if is_last:
            self._held_back.close()
            self._held_back = None

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        """Updates the weights; returns the global gradient norm before clipping."""
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def full_gradients(self) -> dict[str, Tensor]:
        """Every trained parameter's whole gradient, between the last backward and `step`; a collective call, for tests."""
        gradients = {name: safe_get_full_grad(parameter) for name, parameter in self._trained.items()}
        return {name: grad.detach().float().clone() for name, grad in gradients.items() if grad is not None}

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained parameter in float32, whole, on the CPU; a collective call."""
        return {name: safe_get_full_fp32_param(p).detach().to("cpu", copy=True) for name, p in self._trained.items()}

    def trained_names(self) -> dict[str, int]:
        """Names of the trained parameters with their sizes, in one order on all ranks."""
        return {name: getattr(p, "ds_numel", p.numel()) for name, p in self._trained.items()}

    def parameter_state(self, name: str) -> ParameterState:
        """Master weight and moments of one parameter, whole; a collective call, after at least one step."""
        parameter = self._trained[name]
        return ParameterState(
            safe_get_full_fp32_param(parameter),
            safe_get_full_optimizer_state(parameter, "exp_avg"),
            safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
        )

    def set_parameter_state(self, name: str, value: ParameterState, *, steps_done: int) -> None:
        """Takes back what `parameter_state` gave, on any number of ranks; a collective call.

        The weights that the model computes with must have been loaded before the engine was made: this sets their masters.
        """
        self._ensure_moments(steps_done)
        parameter: Any = self._trained[name]
        if self.zero_stage < 3:
            safe_set_full_fp32_param(parameter, value.weight)
            safe_set_full_optimizer_state(parameter, value.exp_avg, "exp_avg")
            safe_set_full_optimizer_state(parameter, value.exp_avg_sq, "exp_avg_sq")
            return
        # DeepSpeed's own setter for whole values reads past the end when the last rank's share is padded.
        size, rank = parameter.ds_tensor.numel(), dist.get_rank()

        def own(whole: Tensor) -> Tensor:
            share = whole.flatten()[rank * size : (rank + 1) * size]
            return torch.nn.functional.pad(share, (0, size - len(share)))

        safe_set_local_fp32_param(parameter, own(value.weight))
        safe_set_local_optimizer_state(parameter, own(value.exp_avg), "exp_avg")
        safe_set_local_optimizer_state(parameter, own(value.exp_avg_sq), "exp_avg_sq")

    def _ensure_moments(self, steps_done: int) -> None:
        """AdamW makes its moments at the first step; a resumed engine needs them before."""
        sharded = self._engine.optimizer
        for flat in _flat_masters(sharded):
            if "exp_avg" not in sharded.optimizer.state[flat]:
                sharded.optimizer.state[flat] = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
            sharded.optimizer.state[flat]["step"] = torch.tensor(float(steps_done))
        if self.zero_stage < 3:
            sharded._lazy_init_hp_params_optimizer_state()


def _flat_masters(sharded: Any) -> list[Tensor]:
    """The flat fp32 tensors that AdamW moves, under the name that each of DeepSpeed's ZeRO optimizers gives them."""
    names = ("single_partition_of_fp32_groups", "fp32_groups_flat_partition", "fp32_partitioned_groups_flat")
    (found,) = [getattr(sharded, name) for name in names if hasattr(sharded, name)]
    return list(found)
