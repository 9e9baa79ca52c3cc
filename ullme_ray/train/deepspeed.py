"""The only place that knows DeepSpeed: an engine whose gradient is reduced over ranks once per step, under ZeRO 0 to 3.

Trap: with several `backward` calls in a step, plain DeepSpeed reduces at each call, and the result is silently wrong under
ZeRO 1 and 2 (cosine 0.68 with the true gradient); the boundary is therefore set by hand at every call.
"""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from torch import Tensor

from ullme_ray.model.two_pass import TwoPassModel
from ullme_ray.spec.job import JobSpec

# On a CPU DeepSpeed would compile a shared-memory all-reduce at first use: half a minute, a C++ compiler, and ranks that must
# share one host. gloo does without all three.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def engine_config(job: JobSpec, world_size: int) -> dict[str, Any]:
    """DeepSpeed's config for a job; what it does not hold is left to DeepSpeed's defaults."""
    assert job.train is not None
    stage, dtype = job.train.deepspeed.zero_stage, job.model.dtype
    return {
        "train_micro_batch_size_per_gpu": job.train.global_batch_size // world_size,  # not used: chunking is ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": job.train.max_grad_norm,  # always written: DeepSpeed's default clips to 1.0
        "zero_optimization": {"stage": stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bfloat16"},
        # The chunks' gradients are summed in fp32, except under ZeRO 0, where DeepSpeed only sums in the dtype of the weights.
        "data_types": {"grad_accum_dtype": "bf16" if stage == 0 and dtype == "bfloat16" else "fp32"},
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """`train.step.Engine` on DeepSpeed; the process group must be up.

    Args:
        module: the model, on the CPU, in the dtype of the job.
        job: the whole job.
        world_size: number of ranks.
    """

    def __init__(self, module: TwoPassModel, job: JobSpec, world_size: int) -> None:
        train = job.train
        assert train is not None
        self.module = module
        self.zero_stage = train.deepspeed.zero_stage
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=train.learning_rate, betas=(0.9, 0.999), weight_decay=train.weight_decay)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=engine_config(job, world_size), dist_init_required=False
        )

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds the gradient of `loss`; the call with `is_last` averages the sum over ranks."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        self._engine.backward(loss)

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self) -> float:
        """Updates the weights; returns the global gradient norm before clipping."""
        # ZeRO 0 in fp32 reports no norm unless it clips; its whole gradient lies in the parameters.
        grads = [p.grad for p in self.module.parameters() if p.grad is not None] if self.zero_stage == 0 else []
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else float("nan")
        self._engine.step()
        reported = self._engine.get_global_grad_norm()
        return float(reported) if reported is not None else norm

    def full_gradients(self) -> dict[str, Tensor]:
        """Every trained parameter's whole gradient, between the last backward and `step`; a collective call, for tests."""
        from deepspeed.utils import safe_get_full_grad

        gradients: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad if self.zero_stage == 0 else safe_get_full_grad(parameter)
                if gradient is not None:
                    gradients[name] = gradient.detach().float().clone()
        return gradients

    def trained_weights(self) -> dict[str, Tensor]:
        """Every trained parameter, whole, on the CPU, under the name it has in `module.lm`; a collective call."""
        weights: dict[str, Tensor] = {}
        for name, parameter in self.module.lm.named_parameters():
            if parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
                    weights[name] = parameter.detach().to("cpu", copy=True)
        return weights

    def save(self, folder: str) -> None:
        """Writes this rank's part of weights and optimizer below a local folder; a collective call."""
        self._engine.save_checkpoint(folder, tag="state", save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: str) -> None:
        """Takes back what `save` wrote, on the same number of ranks; a collective call."""
        path, _ = self._engine.load_checkpoint(folder, tag="state", load_module_strict=False)
        assert path is not None, folder
