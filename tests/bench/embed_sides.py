"""The sides of tests/bench/embed.py: ways to embed the same texts with the same model, each in a process of its own."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from ullme_ray.model import Encoder

ST_DEFAULT = "sentence-transformers, batch 32"
JOB = "our job, end to end"
_ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Setting:
    """What all sides share."""

    model: str  # a local folder
    max_tokens: int
    dtype: str
    threads: int


class Run(NamedTuple):
    """What embedding a set once took."""

    seconds: float
    cpu_s: float  # of the process, all threads; NaN where other processes work for it
    positions: int  # that passed through the model, padding included; 0 where unknown
    memory_bytes: int  # most that the process (CPU) or its tensors (GPU) held; 0 where unknown
    note: str


class Contestant:
    """A way to embed. `variants` are its settings; `embed` gives (N, D) unit vectors in the order of the texts.

    `__init__` may run beside others and times nothing; `settle`, with the machine to itself, finds what is found by timing.
    """

    variants: tuple[str, ...] = ()

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.positions = 0
        self.note = ""

    def watch(self, backbone: Any) -> None:
        embedding = backbone.get_input_embeddings()
        embedding.register_forward_pre_hook(self._count)
        self.num_parameters = sum(p.numel() for p in backbone.parameters()) - embedding.weight.numel()

    def _count(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self.positions += inputs[0].numel()

    def settle(self) -> None:
        """Finds its best settings."""

    def parameters(self) -> int:
        """Of the layers: what a token is multiplied with."""
        return self.num_parameters

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Ends what works for it elsewhere."""

    def timed(self, variant: str, texts: list[str], ids: list[list[int]]) -> tuple[Run, np.ndarray]:
        self.positions, self.note = 0, ""
        _forget_peak(self.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        vectors = self.embed(variant, texts, ids)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        return Run(seconds, cpu_s, self.positions, _peak(self.device), self.note), vectors


class Bare(Contestant):
    """What a careful user writes on one page, without this package."""

    variants = tuple(f"bare loop, {2**n} tokens" for n in (range(12, 18) if _ON_GPU else range(9, 14)))

    def __init__(self, setting: Setting) -> None:
        from transformers import AutoModel, AutoTokenizer

        super().__init__(setting)
        self.tokenizer = AutoTokenizer.from_pretrained(setting.model)
        dtype = getattr(torch, setting.dtype)
        self.model = AutoModel.from_pretrained(setting.model, dtype=dtype, attn_implementation="sdpa").to(self.device).eval()
        self.watch(self.model)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.setting.max_tokens)["input_ids"]

    @torch.inference_mode()
    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        budget = int(variant.split()[-2])
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        out = np.empty((len(ids), self.model.config.hidden_size), dtype=np.float32)
        while order:
            longest = len(ids[order[0]])
            rows, order = order[: max(1, budget // longest)], order[max(1, budget // longest) :]
            batch = torch.zeros(len(rows), longest, dtype=torch.long)
            mask = torch.zeros_like(batch)
            for i, row in enumerate(rows):
                batch[i, : len(ids[row])] = torch.tensor(ids[row])
                mask[i, : len(ids[row])] = 1
            batch, mask = batch.to(self.device), mask.to(self.device)
            states = self.model(input_ids=batch, attention_mask=mask, use_cache=False, is_causal=False).last_hidden_state
            mean = (states.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out[rows] = torch.nn.functional.normalize(mean, dim=1).cpu().numpy()
        return out


class SentenceTransformers(Contestant):
    variants = tuple(
        f"sentence-transformers, batch {size}" for size in ((32, 64, 128, 256, 512, 1024) if _ON_GPU else (32, 4, 8, 16, 64))
    )

    def __init__(self, setting: Setting) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

        super().__init__(setting)
        transformer = Transformer(
            setting.model,
            model_kwargs={"dtype": getattr(torch, setting.dtype), "attn_implementation": "sdpa", "local_files_only": True},
            max_seq_length=setting.max_tokens,
        )
        transformer.model.config.is_causal = False
        transformer.model.config.use_cache = False
        if transformer.tokenizer.pad_token is None:
            transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
        transformer.tokenizer.padding_side = "right"
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
        self.model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device=str(self.device))
        self.watch(transformer.model)

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        return self.model.encode(texts, batch_size=int(variant.split()[-1]), show_progress_bar=False).astype(np.float32)


class Ours(Contestant):
    variants = ("ours", "ours, padded", "ours, from texts")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.encoders = {how: _load(setting, how) for how in ("auto", "off")}
        for encoder in self.encoders.values():
            self.watch(encoder.backbone)

    def settle(self) -> None:
        self.budgets = {how: encoder.find_budget() for how, encoder in self.encoders.items()}

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        from ullme_ray.model import Tokens

        how = "off" if variant.endswith("padded") else "auto"
        encoder, budget = self.encoders[how], self.budgets[how]
        self.note = f"budget {budget.tokens}"
        tokens = (
            encoder.tokenizer.tokenize(texts, "passage") if variant.endswith("texts") else Tokens(ids, 0, [False] * len(ids))
        )
        return encoder.embed_tokens(tokens, tokens_per_batch=budget)


class OursCompiled(Contestant):
    """With `embed.compile`."""

    variants = ("ours, compiled",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.encoder = _load(setting, "auto")
        self.watch(self.encoder.backbone)

    def settle(self) -> None:
        from ullme_ray.model import compile_where_faster

        self.budget = self.encoder.find_budget()
        self.reason = compile_where_faster(self.encoder, self.budget)

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        from ullme_ray.model import Tokens

        self.note = f"budget {self.budget.tokens}" + (f", not kept: {self.reason}" if self.reason else "")
        return self.encoder.embed_tokens(Tokens(ids, 0, [False] * len(ids)), tokens_per_batch=self.budget)


def _load(setting: Setting, unpadded: Any) -> Encoder:
    from ullme_ray.model.encoder import EncoderSettings, load_encoder
    from ullme_ray.spec.job import ModelSpec

    spec = ModelSpec(base=setting.model, max_tokens=setting.max_tokens, dtype=setting.dtype)
    return load_encoder(setting.model, EncoderSettings.of(spec), spec, unpadded=unpadded)


class SentenceTransformersPool(SentenceTransformers):
    """Its multi-process encoding: a process for each GPU, or for each thread of a CPU. Started before the clock runs."""

    variants = tuple(f"sentence-transformers, multi-process, batch {size}" for size in ((32, 256) if _ON_GPU else (32, 8)))

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        devices = [f"cuda:{n}" for n in range(torch.cuda.device_count())] if _ON_GPU else ["cpu"] * setting.threads
        if not _ON_GPU:
            os.environ["OMP_NUM_THREADS"] = "1"
        self.pool = self.model.start_multi_process_pool(devices)

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        size = int(variant.split()[-1])
        pieces = max(1, len(texts) // (4 * len(self.pool["processes"])))
        vectors = self.model.encode(texts, pool=self.pool, batch_size=size, chunk_size=pieces, show_progress_bar=False)
        return vectors.astype(np.float32)

    def timed(self, variant: str, texts: list[str], ids: list[list[int]]) -> tuple[Run, np.ndarray]:
        run, vectors = super().timed(variant, texts, ids)
        return run._replace(cpu_s=math.nan, positions=0, memory_bytes=0), vectors

    def close(self) -> None:
        self.model.stop_multi_process_pool(self.pool)


class Job(Contestant):
    """The whole of `ullme-ray embed`: read, tokenize, embed in one actor, write, commit. A new table each time.

    Starting the actor, loading the model and the commit cost the same for any corpus, hours of work or seconds: a job of a
    single text is timed once, and its time is taken off.
    """

    variants = (JOB,)

    def __init__(self, setting: Setting) -> None:
        import ray

        super().__init__(setting)
        ray.init(
            address="local",
            num_cpus=setting.threads + 2,  # beside the actor a reader and a writer
            num_gpus=torch.cuda.device_count(),
            include_dashboard=False,
            logging_level="WARNING",
            log_to_driver=False,
        )
        self.folder = Path(tempfile.mkdtemp())
        self.start_s = 0.0

    def settle(self) -> None:
        self.budget = _load(self.setting, "auto").find_budget().tokens

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ullme_ray.embed import run_embed
        from ullme_ray.spec.job import JobSpec
        from ullme_ray.table import open_table

        shutil.rmtree(self.folder)
        (self.folder / "in").mkdir(parents=True)
        pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), self.folder / "in" / "texts.parquet")
        actors = {"min": 1, "max": 1, "cpus_per_actor": self.setting.threads, "gpus_per_actor": int(_ON_GPU)}
        job = JobSpec.model_validate(
            {
                "name": "bench",
                "storage": str(self.folder / "runs"),
                "model": {"base": self.setting.model, "max_tokens": self.setting.max_tokens, "dtype": self.setting.dtype},
                "embed": {
                    "input": {"path": str(self.folder / "in"), "id": "id"},
                    "actors": actors,
                    "rows_per_unit": min(4096, max(1, len(texts) // 6)),
                    "tokens_per_batch": self.budget,
                },
            }
        )
        start = time.perf_counter()
        self.report = run_embed(job, progress=False)
        self.seconds = time.perf_counter() - start
        rows = open_table(self.report.table).to_pyarrow_table(columns=["id", "embedding"]).sort_by("id")
        return np.stack(rows["embedding"].to_numpy()).astype(np.float32)

    def timed(self, variant: str, texts: list[str], ids: list[list[int]]) -> tuple[Run, np.ndarray]:
        if not self.start_s:
            self.embed(variant, texts[:1], ids[:1])
            self.embed(variant, texts[:1], ids[:1])  # the first also starts Ray's workers
            self.start_s = self.seconds
        vectors = self.embed(variant, texts, ids)
        positions = round(self.report.tokens / (1.0 - self.report.padding_share))
        note = f"and {self.start_s:.1f} s to start"
        return Run(self.seconds - self.start_s, math.nan, positions, 0, note), vectors

    def close(self) -> None:
        import ray

        ray.shutdown()
        shutil.rmtree(self.folder)


CONTESTANTS: dict[str, type[Contestant]] = {
    "ours": Ours,
    "bare": Bare,
    "compiled": OursCompiled,
    "st": SentenceTransformers,
    "st-processes": SentenceTransformersPool,
    "job": Job,
}


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
