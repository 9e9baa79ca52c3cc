"""Loading backbones: where the files are, how they attend, and what is refused.

Everything is loaded from a local folder of safetensors; hub names and s3:// folders are fetched first.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError

from ullme_ray import storage
from ullme_ray.errors import ModelError, StorageError
from ullme_ray.model.family import (
    backbone_class,
    check_attention,
    check_dims,
    check_length,
    check_objective,
    generates,
    training_class,
)
from ullme_ray.model.probe import probe_attention
from ullme_ray.spec.job import JobSpec, ModelSpec
from ullme_ray.spec.run_folder import RunFolder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
# transformers changes its own classes while it builds a model, and puts back what it found: two threads that build at once (a
# server that reloads one model while it loads another) would leave tied weights untied for the rest of the process.
_BUILDING = threading.Lock()
_HUB_IGNORED = ["original/*", "onnx/*", "openvino/*"]


def base_folder(job: JobSpec) -> str:
    """Local folder of the job's base model.

    Raises:
        ModelError: it cannot be found or fetched.
    """
    model = job.model
    try:
        if model.base == "scratch":
            return storage.fetch_folder(RunFolder.of(job).base)
        path = os.path.expanduser(model.base)
        if storage.is_remote(model.base):
            return storage.fetch_folder(model.base)
        if os.path.isdir(path):
            return os.path.abspath(path)
    except StorageError as error:
        raise ModelError(f"model.base = {model.base} cannot be read: {error}") from error
    if path.startswith((".", "/")) or path.count("/") > 1:
        raise ModelError(
            f"model.base = {model.base} is not a folder; give a model folder, an s3:// folder or a Hugging Face name"
        )
    return _fetch_from_hub(model)


def _fetch_from_hub(model: ModelSpec) -> str:
    from huggingface_hub import snapshot_download

    token = model.hub_token.reveal().get_secret_value() if model.hub_token else None
    try:
        return snapshot_download(
            model.base, revision=model.revision, token=token, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_IGNORED
        )
    except Exception as error:  # noqa: BLE001 - the hub client raises many kinds; all mean that the model is not to be had
        raise ModelError(
            f"model.base = {model.base} is neither a local folder nor reachable on the Hugging Face hub "
            f"({type(error).__name__}); check the name, the network and model.hub_token, or give a local folder"
        ) from None


def load_config(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The model's config with every dropout inside the model off: METHOD's dropout is LoRA's, whose masks we own.

    Raises:
        ModelError: no config, or one transformers does not know.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"no model config can be loaded from {folder}: {str(error).splitlines()[0]}") from error
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
            setattr(config, key, 0.0)
    if getattr(config, "is_causal", None) is False and generates(config):
        config.is_causal = True  # an export of ours: both passes must be possible, and encode asks at each call
    return config


def _backends(attention: str) -> tuple[str, ...]:
    return ("sdpa", "eager") if attention == "auto" else (attention,)


def _load(
    pick_class: Callable[[Any], Any], folder: str, model: ModelSpec, dtype: torch.dtype, device: str, *, quantize: bool = False
) -> Any:
    extra = {"quantization_config": four_bits(dtype), "device_map": {"": torch.cuda.current_device()}} if quantize else {}
    config = load_config(folder, trust_remote_code=model.trust_remote_code)
    auto_class = pick_class(config)
    last_error: Exception | None = None
    for backend in _backends(model.attention):
        try:
            with _BUILDING, torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # a module that the folder has no weights for (BERT's pooler) is the same every time
                module = auto_class.from_pretrained(
                    folder,
                    config=config,
                    dtype=dtype,
                    attn_implementation=backend,
                    use_safetensors=True,
                    trust_remote_code=model.trust_remote_code,
                    local_files_only=True,
                    **extra,
                )
            module = module if quantize else module.to(device)
            backbone = module.base_model if hasattr(module, "lm_head") or module.base_model is not module else module
            probe_attention(backbone, config.get_text_config().vocab_size)
            for name in unused_modules(backbone):
                backbone.get_submodule(name).requires_grad_(False)
        except ModelError as error:
            last_error = error
        except (OSError, ValueError, ImportError, SafetensorError) as error:  # no sdpa in this family, no or torn safetensors
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            last_error = ModelError(f"{folder} cannot be loaded with {backend} attention: {first_line}")
        else:
            return module.eval()
    assert last_error is not None
    raise last_error


def load_backbone(folder: str, model: ModelSpec, *, device: str = "cpu") -> Any:
    """The model without its language-model head, probed, in eval mode.

    Raises:
        ModelError: it cannot be loaded, or cannot attend both ways.
    """
    return _load(backbone_class, folder, model, DTYPES[model.dtype], device)


def load_causal_lm(folder: str, model: ModelSpec, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """The model as training has it, probed, in eval mode: a decoder with its language-model head, or an encoder.

    Args:
        dtype: over the job's, and never in 4 bits: the whole weights, to be merged and exported.
    """
    quantize = dtype is None and model.lora is not None and model.lora.quantize_base is not None
    return _load(training_class, folder, model, dtype or DTYPES[model.dtype], device, quantize=quantize)


def check_quantization(model: ModelSpec) -> None:
    """Before long work: is the library there that `model.lora.quantize_base` needs?

    Raises:
        ModelError: it is not.
    """
    wanted = model.lora is not None and model.lora.quantize_base is not None
    if wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "model.lora.quantize_base = nf4 needs the package bitsandbytes, which is not installed; "
            "pip install bitsandbytes on every machine of the cluster, or remove the key"
        )


def four_bits(dtype: torch.dtype) -> Any:
    """transformers' settings for QLoRA (Dettmers et al. 2023): nf4, twice quantized, computing in `dtype`.

    Raises:
        ModelError: this process has no GPU.
    """
    from transformers import BitsAndBytesConfig

    if not torch.cuda.is_available():
        raise ModelError("model.lora.quantize_base = nf4 needs a GPU, and this machine has none; remove it, or train on GPUs")
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def unused_modules(backbone: Any) -> list[str]:
    """Names of modules that hidden states do not pass through: BERT's pooler, which would never get a gradient."""
    return [name for name, _ in backbone.named_children() if name == "pooler"]


def first_position(backbone: Any, config: Any) -> int:
    """Position of a text's first token: the padding id + 1 where the table of positions has a padding row (RoBERTa)."""
    tables = [m for name, m in backbone.named_modules() if "position" in name and isinstance(m, torch.nn.Embedding)]
    return (config.pad_token_id or 0) + 1 if any(table.padding_idx is not None for table in tables) else 0


def check_family(config: Any, model: ModelSpec) -> str:
    """The attention backend with which the family is an embedder, see `try_family`."""
    return try_family(config, model)[0]


def try_family(config: Any, model: ModelSpec) -> tuple[str, int]:
    """Probes a two-layer random model of the same family, in a second and without its weights.

    Returns:
        The attention backend that passed, and the position of a text's first token.

    Raises:
        ModelError: the family cannot be an embedder.
    """
    import copy

    auto_class = backbone_class(config)
    small = copy.deepcopy(config)
    for key, value in {"num_hidden_layers": 2, "vocab_size": 256, "intermediate_size": 64, "pad_token_id": 0}.items():
        if isinstance(getattr(small, key, None), int):
            setattr(small, key, value)
    if isinstance(getattr(small, "layer_types", None), list):
        small.layer_types = small.layer_types[:2]
    last_error: Exception | None = None
    for backend in _backends(model.attention):
        try:
            with _BUILDING, torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                backbone = auto_class.from_config(
                    small, attn_implementation=backend, trust_remote_code=model.trust_remote_code
                ).float()
            probe_attention(backbone, small.vocab_size)
        except ModelError as error:
            last_error = error
        except (ValueError, ImportError) as error:
            last_error = ModelError(f"model family {config.model_type}: {(str(error).splitlines() or ['refused'])[0]}")
        else:
            return backend, first_position(backbone, config)
    assert last_error is not None
    raise last_error


def check_base(job: JobSpec) -> None:
    """Before long work: is the base there, with safetensors, able to attend both ways, and fit for this objective and length?

    Raises:
        ModelError: with the reason.
    """
    check_quantization(job.model)
    if job.model.base == "scratch":
        return
    folder = base_folder(job)
    config = load_config(folder, trust_remote_code=job.model.trust_remote_code)
    if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
        raise ModelError(
            f"model.base = {job.model.base} holds no .safetensors file; other weight formats can run code and are refused"
        )
    check_objective(job, config)
    check_attention(job, config)
    check_dims(job, config)
    _, first = try_family(config, job.model)
    if job.train or "max_tokens" in job.model.model_fields_set:  # else a sentence-transformers folder may say less
        check_length("model.max_tokens", job.model.max_tokens, config, first)
    if job.train and job.train.objective.needs_generation:
        length = job.train.max_generation_tokens or job.model.max_tokens
        check_length("train.max_generation_tokens", length, config, first)
