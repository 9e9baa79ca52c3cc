"""What ranks tell each other in a step, each an identity where there is one rank; and how long they wait for one another."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, world_size); (0, 1) outside a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def all_gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order: (B, ...) -> (W*B, ...). No gradient; B is the same on every rank."""
    world_size = world()[1]
    if world_size == 1:
        return tensor
    gathered = tensor.new_empty((world_size * len(tensor), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


class _AllGatherWithGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.num_rows = len(tensor)
        return all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss pulls at this rank's rows: sum over ranks, keep our own. (gloo has no reduce_scatter everywhere.)
        rank, world_size = world()
        if world_size > 1:
            grad = grad.contiguous()
            dist.all_reduce(grad)
        return grad[rank * ctx.num_rows : (rank + 1) * ctx.num_rows]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """`all_gather` through which the losses of all ranks send their gradient back: d(sum of losses) / d(own rows)."""
    return _AllGatherWithGrad.apply(tensor)


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks."""
    total = tensor.clone()
    if world()[1] > 1:
        dist.all_reduce(total)
    return total


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value (picklable, small), in rank order."""
    world_size = world()[1]
    if world_size == 1:
        return [value]
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, value)
    return gathered


def is_collective_error(error: BaseException) -> bool:
    """Whether an operation of the process group failed, as it does when another rank is gone or does not answer."""
    if isinstance(error, dist.DistError):
        return True
    marks = ("gloo", "NCCL", "ProcessGroup", "Connection closed by peer", "Timed out waiting", "Connection reset by peer")
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)


def limit_of_later_groups(timeout_s: float) -> None:
    """Process groups that libraries make later get the job's time limit too, not torch's own of 10 and 30 minutes."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = timedelta(seconds=timeout_s)
    if hasattr(distributed_c10d, "default_pg_nccl_timeout"):
        distributed_c10d.default_pg_nccl_timeout = timedelta(seconds=timeout_s)
