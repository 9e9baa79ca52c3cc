"""Memory of one training worker, estimated for every ZeRO stage, and which stages fit its GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ullme_ray.plan.shape import Shape
from ullme_ray.spec import JobSpec
from ullme_ray.spec.job import TrainSpec

BYTES = {"float32": 4, "bfloat16": 2}
ZERO_STAGES = (0, 1, 2, 3)
# States kept for the backward pass per token and layer, in widths H and MLP widths I: counted with saved-tensor hooks on
# Llama (12 H + 4 I in bfloat16) and Qwen3 (18 H + 4 I: its norms on q and k); LoRA adds its dropped inputs and their masks.
_HIDDEN_STATES, _MLP_STATES = 19, 4
_LORA_HIDDEN_STATES, _LORA_MLP_STATES = 8, 1
_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size: elements of the buffer that ZeRO 2 and 3 reduce gradients in
_LIVE_PARAMETERS = 1_000_000_000  # and stage3_max_live_parameters: gathered at the same time under ZeRO 3
_NF4_BYTES = 0.5 + 4 / 64  # 4 bits, and one float32 scale for 64 weights
_USABLE = 0.9  # of a GPU's memory; the rest goes to CUDA, NCCL and the gaps between blocks


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one training worker, at the worst moment of a step."""

    zero_stage: int
    weights: int
    gradients: int
    optimizer: int  # fp32 master weights and Adam's two moments
    reference: int  # the frozen copy that DPO without LoRA compares with
    buffers: int  # DeepSpeed's buckets, and what ZeRO 3 has gathered
    activations: int  # logits included

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference + self.buffers + self.activations

    def fits(self, gpu_memory_gb: float) -> bool:
        return self.total <= _USABLE * gpu_memory_gb * 2**30


def memory_of(job: JobSpec, train: TrainSpec, shape: Shape, zero_stage: int) -> Memory:
    """Bytes on one worker under a ZeRO stage.

    Weights (P) are in model.dtype; gradients of the trained ones (T) are summed in fp32; AdamW keeps 8 bytes per trained
    parameter, and an fp32 copy of 4 more where weights are bfloat16 or sharded. Stage 1 shards the optimizer over the ranks, 3
    also the weights. Gradients wait whole for the one reduction of a step, but for stage 3 in bfloat16 (train/deepspeed.py).
    """
    ranks, objective, lora = train.workers.num_workers, train.objective, job.model.lora
    size = BYTES[job.model.dtype]
    has_master = size < 4 or zero_stage > 0
    weights = shape.parameters * size
    if lora is not None and lora.quantize_base is not None:
        weights += round(shape.linear * (_NF4_BYTES - size))
    copied = objective.needs_reference and (
        objective.reference == "frozen_copy" or (objective.reference == "auto" and lora is None)
    )

    def share(count: int, from_stage: int) -> int:
        return -(-count // ranks) if zero_stage >= from_stage else count

    bucket = min(_BUCKET, shape.trainable)
    buffers = 0 if zero_stage == 0 else 4 * bucket  # the fp32 copy that is communicated
    if zero_stage >= 2:
        buffers += size * (_BUCKET if train.workers.gpus_per_worker else bucket)  # a CPU gives memory only where it is touched
    if zero_stage == 3:
        buffers += size * min(_LIVE_PARAMETERS, shape.parameters)
    on_cpu = zero_stage > 0 and train.deepspeed.offload_optimizer
    return Memory(
        zero_stage=zero_stage,
        weights=0 if zero_stage == 3 and train.deepspeed.offload_parameters else share(weights, 3),
        gradients=4 * (share(shape.trainable, 3) if size < 4 else shape.trainable),
        optimizer=0 if on_cpu else share(shape.trainable, 1) * (8 + 4 * has_master),
        reference=shape.parameters * size if copied else 0,
        buffers=buffers,
        activations=_activations(job, train, shape),
    )


def _activations(job: JobSpec, train: TrainSpec, shape: Shape) -> int:
    """Bytes at the worst moment of one GradCache chunk's backward pass, every text as long as it may be.

    With gradient checkpointing each layer keeps its input, and one layer at a time the rest; attention weights are not kept
    (sdpa). The encode and the generation pass of a chunk both stay until its one backward.
    """
    size = BYTES[job.model.dtype]
    queries = min(train.chunk_size, train.global_batch_size // train.workers.num_workers)
    passages = train.positives_per_query + train.negatives_per_query
    per_layer = states_per_layer(shape.width, shape.intermediate_size, lora=job.model.lora is not None)
    kept = shape.layers * (shape.hidden_size if train.gradient_checkpointing else per_layer)
    encoded = queries * (1 + passages) * job.model.max_tokens
    scored = queries * passages * (train.max_generation_tokens or job.model.max_tokens)
    if not train.objective.needs_generation:
        scored = 0
    layer = max(encoded, scored) * per_layer if train.gradient_checkpointing else 0
    return (encoded + scored) * kept * size + layer * size + scored * shape.vocab_size * _bytes_per_logit(train, size)


def states_per_layer(width: int, intermediate_size: int, *, lora: bool) -> int:
    """Values that one layer keeps of one token for the backward pass."""
    hidden, mlp = _HIDDEN_STATES + lora * _LORA_HIDDEN_STATES, _MLP_STATES + lora * _LORA_MLP_STATES
    return hidden * width + mlp * intermediate_size


def _bytes_per_logit(train: TrainSpec, size: int) -> int:
    """Of model/two_pass.py's passage_logps: logits, their fp32 copy and its log-softmax, which stays for the backward pass.

    The reference's come while the model's log-softmax stays; in the backward pass it stands beside two gradients in fp32.
    """
    forward = size + 4 + 4
    inside_the_step = train.objective.needs_reference and train.objective.reference != "precomputed"
    return max(forward + 4 * inside_the_step, 4 + 4 + 4)


def verdict_of(job: JobSpec, train: TrainSpec, shape: Shape) -> str | None:
    """Which ZeRO stages fit the GPU that the job names; where this job's does not, what would."""
    gpu = train.workers.gpu_memory_gb
    if gpu is None:
        return None

    def fitting(changed: TrainSpec) -> list[str]:
        return [str(stage) for stage in ZERO_STAGES if memory_of(job, changed, shape, stage).fits(gpu)]

    stages = fitting(train)
    name = f"{gpu:g} GB"
    if str(train.deepspeed.zero_stage) in stages:
        return f"fits {name}: ZeRO {', '.join(stages)}"
    head = f"does not fit {name} under ZeRO {train.deepspeed.zero_stage}"
    if stages:
        return f"{head}; ZeRO {', '.join(stages)} would: set train.deepspeed.zero_stage"
    changes: dict[str, Any] = {}
    if not train.gradient_checkpointing:
        changes["gradient_checkpointing"] = True
    chunk = train.chunk_size
    while True:
        stages = fitting(train.model_copy(update=changes))
        if stages:
            shown = ", ".join(f"train.{key}: {str(value).lower()}" for key, value in changes.items())
            return f"{head}, nor any other; with {shown} ZeRO {', '.join(stages)} would"
        if chunk == 1:
            break
        chunk //= 2
        changes["chunk_size"] = chunk
    return (
        f"{head}, nor any other; use more workers with ZeRO 3, model.lora, train.deepspeed.offload_optimizer or a smaller model"
    )


def memory_table(rows: tuple[Memory, ...], chosen: int | None) -> list[str]:
    names = ("weights", "gradients", "optimizer", "reference", "buffers", "activations", "total")
    lines = ["ZeRO  " + "".join(f"{name:>13}" for name in names)]
    for row in rows:
        mark = "  <- this job" if row.zero_stage == chosen else ""
        lines.append(f"{row.zero_stage:<6}" + "".join(f"{_size(getattr(row, name)):>13}" for name in names) + mark)
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
