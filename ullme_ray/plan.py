"""What a job would do, before it does it: batch arithmetic, steps, parameters, memory per worker, units to embed.

Loads no weights: parameters are counted on torch's meta device. Costs a few seconds of imports and a listing of the corpus.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ullme_ray import storage
from ullme_ray.errors import ModelError, UllmeError
from ullme_ray.runtime import pools
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import TrainSpec

if TYPE_CHECKING:
    from torch import nn

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


@dataclass(frozen=True)
class Plan:
    """Everything `ullme-ray plan` prints; absent parts are explained in `notes`."""

    name: str
    folder: str
    stages: tuple[str, ...]
    processes: dict[str, str]
    batch: str | None = None
    steps: str | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    memory: tuple[Memory, ...] = ()
    zero_stage: int | None = None
    verdict: str | None = None
    embed: dict[str, int] | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"memory": [asdict(m) | {"total": m.total} for m in self.memory]}

    def to_text(self) -> str:
        lines = [f"{self.name}: {' -> '.join(self.stages)}", f"  folder      {self.folder}"]
        lines += [f"  {stage:<11} {text}" for stage, text in self.processes.items()]
        if self.parameters is not None:
            lines.append(f"  parameters  {self.parameters:,}, of which {self.trainable_parameters or 0:,} are trained")
        if self.batch:
            lines += [f"  batch       {self.batch}", f"  steps       {self.steps}"]
        if self.memory:
            lines.append("  memory per worker, estimated:")
            lines += [f"    {line}" for line in _memory_table(self.memory, self.zero_stage)]
        if self.verdict is not None:
            lines.append(f"    {self.verdict}")
        if self.embed is not None:
            lines.append("  to embed    " + ", ".join(f"{count:,} {name}" for name, count in self.embed.items()))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass
class _Shape:
    """What the estimate needs of a model."""

    parameters: int
    trainable: int
    linear: int  # weights of linear layers but the head: those that QLoRA quantizes
    hidden_size: int
    width: int  # of the states in a layer: hidden_size, or all heads together where they are wider, as in Qwen3
    intermediate_size: int
    layers: int
    vocab_size: int
    notes: list[str] = field(default_factory=list)


def make_plan(job: JobSpec) -> Plan:
    """Works it out. What cannot be known yet (a hub model without network, data not yet written) becomes a note."""
    notes: list[str] = []
    plan: dict[str, Any] = {
        "name": job.name,
        "folder": RunFolder.of(job).root,
        "stages": job.stages,
        "processes": {pool.stage: _processes(pool.min, pool.max, pool.cpus, pool.gpus) for pool in pools(job)},
    }
    shape = None
    try:
        shape = _shape(job)
        plan |= {"parameters": shape.parameters, "trainable_parameters": shape.trainable if job.train else 0}
        notes += shape.notes
    except ModelError as error:
        notes.append(f"parameters and memory are unknown: {error}")
    if job.train:
        from ullme_ray.train.launch import batch_arithmetic

        plan |= {"batch": batch_arithmetic(job), "steps": _steps(job.train), "zero_stage": job.train.deepspeed.zero_stage}
        if shape:
            plan["memory"] = tuple(_memory(job, job.train, shape, stage) for stage in ZERO_STAGES)
            plan["verdict"] = _verdict(job, job.train, shape)
    if job.embed:
        try:
            plan["embed"] = _units(job)
        except (UllmeError, FileNotFoundError) as error:
            later = job.dataset is not None and job.embed.input.path.startswith("run:data")
            notes.append("units to embed: known once `run` has written the data set" if later else f"units to embed: {error}")
    return Plan(**plan, notes=tuple(notes))


def _units(job: JobSpec) -> dict[str, int]:
    from ullme_ray.embed import num_files, plan_units

    units = plan_units(job)
    files = num_files({unit.file for unit in units})
    return {"rows": sum(unit.num_rows for unit in units), "units": len(units), "files": files}


def _processes(least: int, most: int, cpus: float, gpus: float) -> str:
    count = str(least) if least == most else f"{least} to {most}"
    return f"{count} x ({cpus:g} CPU" + (f", {gpus:g} GPU)" if gpus else ")")


def _steps(train: TrainSpec) -> str:
    return (
        f"{train.max_steps:,} x {train.global_batch_size:,} queries = {train.max_steps * train.global_batch_size:,}; "
        f"{train.warmup_steps:,} warm-up steps, then {train.lr_schedule} from {train.learning_rate:g}; "
        f"a checkpoint every {train.checkpoint_every_steps:,}"
    )


def _shape(job: JobSpec) -> _Shape:
    """Counts parameters by building the model, and its LoRA adapters, without memory for them.

    Raises:
        ModelError: the model's config cannot be had.
    """
    import torch

    from ullme_ray.model.family import training_class

    notes = []
    config = _config(job)
    with torch.device("meta"):
        model = training_class(config).from_config(config, trust_remote_code=job.model.trust_remote_code)
    if job.model.base == "scratch":
        notes.append(f"the vocabulary has at most {job.model.scratch.vocab_size:,} tokens; fewer if the texts are few")
    parameters = trainable = _count(model)
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    if job.model.lora is not None:
        from ullme_ray.model.adapters import add_lora
        from ullme_ray.model.dropout import RowSeeds

        with torch.device("meta"):
            trainable = _count(add_lora(model, job.model.lora, RowSeeds()), trained_only=True)
        parameters += trainable
    if job.model.pooling == "latent_attention":
        from ullme_ray.model.latent_attention import LatentAttention

        latent = job.model.latent_attention
        with torch.device("meta"):
            head = _count(LatentAttention(config.get_text_config().hidden_size, latent.latents, latent.heads))
        parameters, trainable = parameters + head, trainable + head
    text = config.get_text_config()
    return _Shape(
        parameters=parameters,
        trainable=trainable,
        linear=linear,
        hidden_size=text.hidden_size,
        width=max(text.hidden_size, getattr(text, "num_attention_heads", 0) * (getattr(text, "head_dim", None) or 0)),
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        vocab_size=text.vocab_size,
        notes=notes,
    )


def _count(model: nn.Module, *, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def _config(job: JobSpec) -> Any:
    """The base model's config; of a hub or S3 model only `config.json` is fetched."""
    from ullme_ray.model.backbone import load_config

    model = job.model
    if model.base == "scratch":
        from ullme_ray.model.scratch import scratch_config

        return scratch_config(model.scratch, max_tokens=model.max_tokens, vocab_size=model.scratch.vocab_size)
    folder = os.path.expanduser(model.base)
    if os.path.isdir(folder):
        return load_config(folder, trust_remote_code=model.trust_remote_code)
    if storage.is_remote(model.base):
        try:
            content = storage.read_bytes(storage.join(model.base, "config.json"))
        except (UllmeError, FileNotFoundError) as error:
            raise ModelError(f"model.base = {model.base} has no readable config.json: {error}") from error
        with tempfile.TemporaryDirectory() as local:
            storage.write_bytes(f"{local}/config.json", content)
            return load_config(local, trust_remote_code=model.trust_remote_code)
    if folder.startswith((".", "/")) or folder.count("/") > 1:
        raise ModelError(f"model.base = {model.base} is not a folder")
    return load_config(_fetch_hub_config(job), trust_remote_code=model.trust_remote_code)


def _fetch_hub_config(job: JobSpec) -> str:
    from huggingface_hub import hf_hub_download

    model = job.model
    token = model.hub_token.reveal().get_secret_value() if model.hub_token else None
    try:
        return os.path.dirname(hf_hub_download(model.base, "config.json", revision=model.revision, token=token))
    except Exception as error:  # noqa: BLE001 - the hub client raises many kinds; all mean that the config is not to be had
        raise ModelError(
            f"model.base = {model.base} is no local folder, and its config cannot be had from the Hugging Face hub"
            f" ({type(error).__name__}); check the name and the network"
        ) from None


def _memory(job: JobSpec, train: TrainSpec, shape: _Shape, zero_stage: int) -> Memory:
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


def _activations(job: JobSpec, train: TrainSpec, shape: _Shape) -> int:
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


def _verdict(job: JobSpec, train: TrainSpec, shape: _Shape) -> str | None:
    """Which ZeRO stages fit the GPU that the job names; where this job's does not, what would."""
    gpu = train.workers.gpu_memory_gb
    if gpu is None:
        return None

    def fitting(changed: TrainSpec) -> list[str]:
        return [str(stage) for stage in ZERO_STAGES if _memory(job, changed, shape, stage).fits(gpu)]

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


def _memory_table(rows: tuple[Memory, ...], chosen: int | None) -> list[str]:
    names = ("weights", "gradients", "optimizer", "reference", "buffers", "activations", "total")
    lines = ["ZeRO  " + "".join(f"{name:>13}" for name in names)]
    for row in rows:
        mark = "  <- this job" if row.zero_stage == chosen else ""
        lines.append(f"{row.zero_stage:<6}" + "".join(f"{_size(getattr(row, name)):>13}" for name in names) + mark)
    return lines


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
