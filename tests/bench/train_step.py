"""How fast a training step is on the machine at hand: `python tests/bench/train_step.py [--quick] [--json FILE]`.

Prints Markdown tables: our `cl` step beside sentence-transformers' CachedMultipleNegativesRankingLoss, our `grl` step beside
its cost model, and sweeps of chunk_size and ZeRO stage. Ours is the step of a real job: `train_step` through its engine
on one rank (NCCL on a GPU, gloo without), the update included. Theirs is what their trainer does: loss, backward,
fused AdamW.

Equal on both sides: weights, attention both ways, mean pooling, texts (the built-in data set, lengths as they come), batch,
longest text, dtype, LoRA shape, learning rate, temperature, threads. Not timed on either: tokenizing, which a job does ahead.

A step is timed from token ids on the device to updated weights. Each side is a process of its own, so that its peak memory is
its own, and waits while another runs; sides take turns step by step, in changing order, so that a drift of the machine meets
all alike. Quoted are medians, and ratios of each pair's times.

Cost: --quick (a random model of 2 layers) a minute; SmolLM2-135M on two CPU cores about half an hour.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for smollm2
sys.path.insert(0, str(Path(__file__).parent))
from side_process import side_processes

MODEL_NAMES = {"smollm2": "SmolLM2-135M", "scratch": "random, 2 layers of width 256"}
_LORA_DROPOUT = 0.1


@dataclass(frozen=True)
class Setting:
    """What all sides share."""

    model: str  # a local folder
    storage: str  # where the data set lies
    batch_size: int
    max_tokens: int
    dtype: str
    lora: bool
    lora_dropout: float
    learning_rate: float
    threads: int
    peak: float  # FLOP/s of the device
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """One contestant. `chunk_size` is queries of a chunk for ours, texts of a mini-batch for theirs."""

    name: str
    chunk_size: int
    theirs: bool = False
    objective: str = "cl"
    zero_stage: int = 1


class Step(NamedTuple):
    """What one step took and did."""

    seconds: float
    cpu_s: float  # of the process, all threads: what a shared machine disturbs least
    loss: float
    encode_tokens: int  # real tokens: queries and passages
    generate_tokens: int  # real tokens: prompt + passage
    positions: int  # of all forward passes, padding and second passes included
    useful_flop: float  # 3F per token, F = 2 x non-embedding parameters
    executed_flop: float  # GradCache's second pass, the reference and the head counted, the saving of LoRA too
    memory_bytes: int  # peak of the process (CPU) or of its tensors (GPU) so far


def job_of(setting: Setting, side: Side) -> Any:
    from ullme_ray.spec.job import JobSpec

    lora = {"rank": 16, "alpha": 32, "dropout": setting.lora_dropout} if setting.lora else None
    return JobSpec.model_validate(
        {
            "name": "bench",
            "storage": setting.storage,
            "seed": setting.seed,
            "model": {"base": setting.model, "max_tokens": setting.max_tokens, "dtype": setting.dtype, "lora": lora},
            "dataset": {"name": "aws_api_docs", "negatives_per_query": 1},
            "train": {
                "objective": side.objective,
                "data": [{"path": "run:data/train.jsonl"}],
                "global_batch_size": setting.batch_size,
                "chunk_size": side.chunk_size,
                "learning_rate": setting.learning_rate,
                "workers": {"gpus_per_worker": int(torch.cuda.is_available())},
                "deepspeed": {"zero_stage": side.zero_stage},
            },
        }
    )


class Contestant:
    """A side at work in this process. A subclass loads the model in `__init__` and trains in `step`."""

    def __init__(self, setting: Setting, side: Side) -> None:
        from ullme_ray.pairs import read_sources
        from ullme_ray.train.data import BatchSampler

        self.setting, self.side, self.job = setting, side, job_of(setting, side)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sampler = BatchSampler(read_sources(self.job), self.job.train, seed=setting.seed)
        self.positions = 0

    def watch(self, lm: Any) -> None:
        """Notes the size of a language model or backbone, and from now on every position that passes through it."""
        embedding = lm.get_input_embeddings()
        head = lm.get_output_embeddings()
        self.num_parameters = sum(p.numel() for p in lm.base_model.parameters()) - embedding.weight.numel()
        self.num_head_parameters = head.weight.numel() if head is not None else 0
        embedding.register_forward_pre_hook(self._count)

    def _count(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        self.positions += inputs[0].numel()

    def timed(self, work: Callable[[], float]) -> tuple[float, float, float]:
        """(seconds, CPU seconds, loss) of one step."""
        self.positions = 0
        self._synchronize()
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = work()
        self._synchronize()
        return time.perf_counter() - start, time.process_time() - cpu_start, loss

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def result(self, timed: tuple[float, float, float], encode: int, generate: int, *, second_pass: int, scored: int) -> Step:
        """`second_pass`: tokens that are encoded twice; `scored`: positions of the head."""
        from ullme_ray.train.metrics import step_flops

        forward = 2 * self.num_parameters  # FLOP per token
        backward = forward if self.setting.lora else 2 * forward
        has_reference = self.side.objective == "grl"
        executed = (forward + backward) * (encode + generate) + forward * (second_pass + has_reference * generate)
        executed += 2 * self.num_head_parameters * scored * ((2 if self.setting.lora else 3) + has_reference)
        return Step(
            *timed,
            encode,
            generate,
            self.positions,
            step_flops(self.num_parameters, encode, generate),
            executed,
            self._memory_bytes(),
        )

    def _memory_bytes(self) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def step(self, number: int) -> Step:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing works for it elsewhere."""


class Ours(Contestant):
    def __init__(self, setting: Setting, side: Side) -> None:
        import torch.distributed as dist

        from ullme_ray.model.encoder import open_tokenizer
        from ullme_ray.model.two_pass import build_two_pass
        from ullme_ray.train.open_engine import open_engine

        super().__init__(setting, side)
        os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.tokenizer = open_tokenizer(self.job, which="base")
        objective = self.job.train.objective
        reference = objective.reference if objective.needs_reference else "none"
        module = build_two_pass(setting.model, self.job.model, reference=reference, seed=setting.seed)
        self.watch(module.causal_lm)
        self.engine = open_engine(module, self.job, 1)

    def step(self, number: int) -> Step:
        from ullme_ray.train.collate import collate, shortest_first
        from ullme_ray.train.step import train_step

        train = self.job.train
        batch = collate(
            shortest_first(self.sampler.examples(number, 0, train.global_batch_size)),
            self.tokenizer,
            with_generation=train.objective.needs_generation,
            max_generation_tokens=self.setting.max_tokens,
        )
        chunks = batch.chunks(train.chunk_size)
        scored = int(batch.generation.passage_lengths.sum()) if batch.generation is not None else 0
        on_device = batch.to(self.engine.device)

        def work() -> float:
            seed = self.setting.seed
            return train_step(self.engine, on_device, train.objective, chunk_size=train.chunk_size, step=number, seed=seed).loss

        second_pass = sum(chunk.num_encode_tokens for chunk in chunks[:-1])
        tokens = batch.num_encode_tokens, batch.num_generate_tokens
        return self.result(self.timed(work), *tokens, second_pass=second_pass, scored=scored)


class Theirs(Contestant):
    def __init__(self, setting: Setting, side: Side) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        from ullme_ray.model.backbone import DTYPES

        super().__init__(setting, side)
        transformer = Transformer(
            setting.model,
            model_kwargs={"dtype": DTYPES[setting.dtype], "attn_implementation": "sdpa", "local_files_only": True},
            max_seq_length=setting.max_tokens,
        )
        transformer.model.config.is_causal = False
        transformer.model.config.use_cache = False
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
        self.model = SentenceTransformer(modules=[transformer, pooling], device=str(self.device))
        if self.model.tokenizer.pad_token is None:
            self.model.tokenizer.pad_token = self.model.tokenizer.eos_token
        self.model.tokenizer.padding_side = "right"
        backbone = transformer.model
        self.watch(backbone)
        if setting.lora:
            from peft import LoraConfig

            linear = {name.split(".")[-1] for name, m in backbone.named_modules() if isinstance(m, torch.nn.Linear)}
            config = LoraConfig(r=16, lora_alpha=32, lora_dropout=setting.lora_dropout, target_modules=sorted(linear))
            backbone.add_adapter(config)
        self.model.train()
        temperature = self.job.train.objective.temperature
        self.loss = CachedMultipleNegativesRankingLoss(self.model, scale=1 / temperature, mini_batch_size=side.chunk_size)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0, fused=True)

    def step(self, number: int) -> Step:
        rows = self.sampler.examples(number, 0, self.setting.batch_size)
        columns = ([r.query for r in rows], [r.positives[0] for r in rows], [r.negatives[0] for r in rows])
        # Not `preprocess`, which would put texts into the chat template where a tokenizer has one; then tokens would differ.
        features = [
            dict(
                self.model.tokenizer(
                    texts, padding=True, truncation=True, max_length=self.setting.max_tokens, return_tensors="pt"
                ).to(self.device)
            )
            for texts in columns
        ]
        tokens = sum(int(f["attention_mask"].sum()) for f in features)

        def work() -> float:
            loss = self.loss(features, None)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return float(loss.detach())

        return self.result(self.timed(work), tokens, 0, second_pass=tokens, scored=0)


def in_turn(setting: Setting, sides: Sequence[Side], *, rounds: int, warm_up: int = 1) -> list[list[Step]]:
    """Steps of each side, all sides at the same step before the next, in changing order; warm-up steps are left out."""
    steps: list[list[Step]] = [[] for _ in sides]
    make = {side.name: partial(Theirs if side.theirs else Ours, setting, side) for side in sides}
    with side_processes(make, threads=setting.threads) as processes:
        for number in range(warm_up + rounds):
            order = list(range(len(sides)))
            for position in order if number % 2 else reversed(order):
                name = sides[position].name
                step = processes[name].call("step", number)
                print(f"  {name}: step {number + 1}, {step.seconds:.2f} s, CPU {step.cpu_s:.2f} s", file=sys.stderr)
                if number >= warm_up:
                    steps[position].append(step)
            tokens = {sides[p].name: own[-1].encode_tokens for p, own in enumerate(steps) if own}
            assert len(set(tokens.values())) <= 1, f"the sides are to train on the same tokens: {tokens}"
    return steps


class Line(NamedTuple):
    """A side's figures: medians over its steps."""

    side: str
    step_s: float
    fastest_s: float
    slowest_s: float
    tokens_per_s: float
    memory_gib: float
    mfu: float
    positions_per_token: float
    executed_tflop: float
    executed_tflops: float  # per second
    times_first: float  # median over the rounds of (this side's seconds / the first side's)
    cpu_times_first: float  # the same of CPU seconds


def lines_of(setting: Setting, sides: Sequence[Side], steps: Sequence[Sequence[Step]]) -> list[Line]:
    lines = []
    for side, own in zip(sides, steps):
        seconds = [s.seconds for s in own]
        pairs = list(zip(own, steps[0]))
        lines.append(
            Line(
                side.name,
                statistics.median(seconds),
                min(seconds),
                max(seconds),
                statistics.median((s.encode_tokens + s.generate_tokens) / s.seconds for s in own),
                max(s.memory_bytes for s in own) / 2**30,
                statistics.median(s.useful_flop / s.seconds for s in own) / setting.peak,
                statistics.median(s.positions / (s.encode_tokens + s.generate_tokens) for s in own),
                statistics.median(s.executed_flop for s in own) / 1e12,
                statistics.median(s.executed_flop / s.seconds for s in own) / 1e12,
                statistics.median(a.seconds / b.seconds for a, b in pairs),
                statistics.median(a.cpu_s / b.cpu_s for a, b in pairs),
            )
        )
    return lines


def table(title: str, lines: Sequence[Line]) -> str:
    """Times as a share of the first line's are medians over the pairs."""
    head = ("", "step, s (min to max)", "tokens/s", "peak memory, GiB", "MFU", "positions run per token")
    first = lines[0].side
    cells = [(*head, f"time / {first}", f"CPU time / {first}"), ("---",) * (len(head) + 2)]
    for line in lines:
        cells.append(
            (
                line.side,
                f"{line.step_s:.2f} ({line.fastest_s:.2f} to {line.slowest_s:.2f})",
                f"{line.tokens_per_s:,.0f}",
                f"{line.memory_gib:.2f}",
                f"{line.mfu:.1%}",
                f"{line.positions_per_token:.2f}",
                f"{line.times_first:.2f}",
                f"{line.cpu_times_first:.2f}",
            )
        )
    return markdown(title, cells)


def cost_model_table(lines: Sequence[Line]) -> str:
    """Does a grl step take as much longer than a cl step as its work is more?"""
    cl, grl = lines
    cells = [("", "executed TFLOP", "step, s", "TFLOP/s", "CPU time"), ("---",) * 5]
    cells += [(x.side, f"{x.executed_tflop:.2f}", f"{x.step_s:.2f}", f"{x.executed_tflops:.3f}", "") for x in lines]
    predicted = f"{grl.executed_tflop / cl.executed_tflop:.2f} predicted"
    cells.append((f"{grl.side} / {cl.side}", predicted, f"{grl.times_first:.2f} measured", "", f"{grl.cpu_times_first:.2f}"))
    return markdown("grl against its cost model (executed FLOP of real tokens, the head's included)", cells)


def markdown(title: str, cells: Sequence[Sequence[str]]) -> str:
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(row) + " |" for row in cells)]) + "\n"


def machine() -> str:
    """The device in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        names = [s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if s.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, CPU only"


def prepare(args: argparse.Namespace, folder: str) -> Setting:
    """Model and data on disk, and the device's peak."""
    from smollm2 import make_smollm2

    from ullme_ray.model.backbone import DTYPES
    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.model.speed import peak_flops
    from ullme_ray.pairs import read_sources
    from ullme_ray.sample_data import ensure_dataset
    from ullme_ray.spec.job import ScratchSpec

    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(
        model=args.model or f"{folder}/model",
        storage=folder,
        batch_size=args.batch_size,
        max_tokens=args.max_tokens,
        dtype=args.dtype,
        lora=args.lora,
        lora_dropout=_LORA_DROPOUT,
        learning_rate=2e-5,
        threads=args.threads,
        peak=max(peak_flops(device, DTYPES[args.dtype]) for _ in range(20)),  # of many: a busy machine only ever takes away
    )
    job = job_of(setting, Side("", args.chunk_size))
    ensure_dataset(job)
    if args.quick and not args.model:
        texts = [text for pair in read_sources(job)[0].pairs for text in (pair.query, *pair.positives)]
        build_scratch(texts, ScratchSpec(), max_tokens=args.max_tokens, seed=0, folder=setting.model)
    elif not args.model:
        make_smollm2(Path(setting.model))
    return setting


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a random model of 2 layers in place of SmolLM2-135M")
    parser.add_argument("--model", help="folder of a decoder; absent: SmolLM2-135M, fetched and rebuilt")
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 16, help="queries of a step")
    parser.add_argument("--chunk-size", type=int, default=32 if gpu else 4, help="queries of a GradCache chunk")
    parser.add_argument("--max-tokens", type=int, default=512 if gpu else 128)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--lora", action="store_true", help=f"rank 16, dropout {_LORA_DROPOUT}, on all linear layers")
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps of each side after one to warm up; 3 at most in sweeps"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=("compare", "grl", "chunks", "zero"), help="some of the tables")
    parser.add_argument("--json", help="also write all figures to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    chunk, batch = args.chunk_size, args.batch_size
    wanted = args.only or ["compare", "grl", "chunks", "zero"]
    ours = Side("ours", chunk)
    contests: dict[str, tuple[str, list[Side]]] = {
        "compare": (
            "cl step, ours and sentence-transformers' CachedMultipleNegativesRankingLoss",
            # A chunk of ours is C queries and their 2C passages. Theirs gets both ways to be equal: C and 2C texts at a time.
            [ours, *(Side(f"theirs, mini-batch {size}", size, theirs=True) for size in (chunk, 2 * chunk))],
        ),
        "grl": ("cl and grl step", [Side("cl", chunk), Side("grl", chunk, objective="grl")]),
        "chunks": (
            "chunk_size, cl step",
            [Side(f"chunk_size {size}", size) for size in dict.fromkeys((chunk, max(1, chunk // 4), 4 * chunk, batch))],
        ),
        "zero": ("ZeRO stage on one rank, cl step", [Side(f"ZeRO {stage}", chunk, zero_stage=stage) for stage in range(4)]),
    }
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(args, folder)
        figures: dict[str, Any] = {
            "machine": machine(),
            "setting": dataclasses.asdict(setting),
            "chunk_size": chunk,
            "torch": torch.__version__,
            "tables": {},
        }
        model = Path(args.model).name if args.model else MODEL_NAMES["scratch" if args.quick else "smollm2"]
        print(
            f"{figures['machine']}; {setting.threads} threads; {model}, {'LoRA' if args.lora else 'full'}, {args.dtype}; "
            f"{batch} queries with 2 passages each, at most {args.max_tokens} tokens, chunk_size {chunk}; "
            f"peak {setting.peak / 1e12:.2f} TFLOP/s; {args.rounds} rounds\n"
        )
        for name in wanted:
            title, sides = contests[name]
            # Sweeps run in pairs with their first side, so that no more than two models are in memory.
            groups = [sides] if name == "compare" else [[sides[0], side] for side in sides[1:]]
            lines: list[Line] = []
            for group in groups:
                steps = in_turn(setting, group, rounds=args.rounds if name == "compare" else min(args.rounds, 3))
                lines += lines_of(setting, group, steps)[len(lines) > 0 :]
                figures["tables"].setdefault(name, []).append(
                    [{"side": dataclasses.asdict(s), "steps": [x._asdict() for x in own]} for s, own in zip(group, steps)]
                )
            print(table(title, lines), flush=True)
            if name == "grl":
                print(cost_model_table(lines), flush=True)
            figures["tables"][name] = {"lines": [line._asdict() for line in lines], "groups": figures["tables"][name]}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
