"""How fast one model embeds on the machine at hand: `python tests/bench/embed.py [--quick] [--json FILE]`.

Prints a Markdown table for each of three sets of texts (short, long, mixed lengths), with these sides:
- a bare loop as one writes it by hand: length-sorted, padded batches of a token budget, the best of several budgets;
- sentence-transformers' `encode`, with its default batch size and with the best of several;
- ours: `Encoder.embed_tokens` as an actor calls it, its budget found by itself; padded; and from texts, tokenizing included.

Equal for all: weights, attention both ways, mean pooling, unit length, texts, dtype, threads; vectors are compared (cosine).
Sides are processes that wait while another runs. They take turns in changing order, so that a drift of the machine meets all
alike; quoted are medians over rounds, and ratios of CPU seconds of the same round, which a shared machine disturbs least.

Cost: --quick (a random model of 2 layers) a minute; SmolLM2-135M on two CPU cores about twenty.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[1]))  # for smollm2
sys.path.insert(0, str(Path(__file__).parent))
from train_step import machine, markdown

SETS = ("short", "long", "mixed")
_MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.99}  # sentence-transformers also pools in the model's type
ST_DEFAULT = "sentence-transformers, batch 32"


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
    cpu_s: float  # of the process, all threads
    positions: int  # that passed through the model, padding included
    memory_bytes: int  # most that the process (CPU) or its tensors (GPU) held
    note: str


class Contestant:
    """A way to embed. `variants` are its settings; `embed` gives (N, D) unit vectors in the order of the texts."""

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

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        raise NotImplementedError

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        raise NotImplementedError

    def timed(self, variant: str, texts: list[str], ids: list[list[int]]) -> tuple[Run, np.ndarray]:
        self.positions, self.note = 0, ""
        _forget_peak(self.device)
        start, cpu_start = time.perf_counter(), time.process_time()
        vectors = self.embed(variant, texts, ids)
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        return Run(seconds, cpu_s, self.positions, _peak(self.device), self.note), vectors


class Bare(Contestant):
    """What a careful user writes on one page, without this package."""

    variants = tuple(f"bare loop, {2**n} tokens" for n in range(9, 14))

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
    variants = tuple(f"sentence-transformers, batch {size}" for size in (32, 4, 8, 16, 64, 128))

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
        from ullme_ray.model.encoder import EncoderSettings, load_encoder
        from ullme_ray.spec.job import ModelSpec

        super().__init__(setting)
        spec = ModelSpec(base=setting.model, max_tokens=setting.max_tokens, dtype=setting.dtype)
        self.encoders = {
            how: load_encoder(setting.model, EncoderSettings.of(spec), spec, unpadded=how) for how in ("auto", "off")
        }
        self.budgets = {how: encoder.find_budget() for how, encoder in self.encoders.items()}
        for encoder in self.encoders.values():
            self.watch(encoder.backbone)

    def embed(self, variant: str, texts: list[str], ids: list[list[int]]) -> np.ndarray:
        from ullme_ray.model import Tokens

        how = "off" if variant.endswith("padded") else "auto"
        encoder, budget = self.encoders[how], self.budgets[how]
        self.note = f"budget {budget.tokens}"
        tokens = (
            encoder.tokenizer.tokenize(texts, "passage") if variant.endswith("texts") else Tokens(ids, 0, [False] * len(ids))
        )
        return encoder.embed_tokens(tokens, tokens_per_batch=budget)


CONTESTANTS: tuple[type[Contestant], ...] = (Ours, Bare, SentenceTransformers)


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


def _serve(kind: type[Contestant], setting: Setting, connection: Any) -> None:
    """A side's process: answers each call with what came of it, errors with their text, until None comes."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    torch.set_num_threads(setting.threads)
    try:
        contestant = kind(setting)
        connection.send(contestant.num_parameters)
        while (call := connection.recv()) is not None:
            name, arguments = call
            connection.send(getattr(contestant, name)(*arguments))
    except EOFError:  # the asking process ended
        pass
    except BaseException:  # noqa: BLE001 - told in the asking process, which stops
        connection.send(traceback.format_exc())


class SideProcess:
    """A contestant in a process of its own."""

    def __init__(self, kind: type[Contestant], setting: Setting) -> None:
        self.kind = kind
        context = mp.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(kind, setting, other), daemon=True)
        self._process.start()
        other.close()
        self.num_parameters: int = self.answer()

    def call(self, name: str, *arguments: Any) -> Any:
        self._connection.send((name, arguments))
        return self.answer()

    def answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.kind.__name__} died; look at its output above (memory?)") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.kind.__name__}:\n{answer}")
        return answer

    def close(self) -> None:
        self._connection.send(None)
        self._process.join()


def make_texts(corpus: Sequence[str], name: str, num_tokens: int, tokenizer: Any, *, max_tokens: int) -> list[str]:
    """Texts of the corpus, joined and cut to drawn lengths, of about `num_tokens` tokens together."""
    generator = np.random.default_rng([7, SETS.index(name)])
    texts: list[str] = []
    total = 0
    while total < num_tokens:
        length = {
            "short": int(generator.integers(8, 49)),
            "long": int(generator.integers(max_tokens // 2, max_tokens + 1)),
            "mixed": int(np.clip(generator.lognormal(np.log(90), 0.9), 8, max_tokens)),
        }[name]
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer(corpus[generator.integers(len(corpus))] + "\n")["input_ids"]
        texts.append(tokenizer.decode(ids[:length], skip_special_tokens=True))
        total += length
    return texts


def contest(
    processes: Sequence[SideProcess], texts: list[str], *, rounds: int, min_cosine: float
) -> tuple[dict[str, list[Run]], int]:
    """Runs of every side by name, and the tokens of the set. All variants meet once; then the best of each side goes on."""
    sides = [(process, variant) for process in processes for variant in process.kind.variants]
    bare = next(process for process in processes if process.kind is Bare)
    ids = bare.call("tokenize", texts)
    runs: dict[str, list[Run]] = {}
    wanted: np.ndarray | None = None
    for number in range(rounds + 1):
        for process, variant in sides if number % 2 else reversed(sides):
            run, vectors = process.call("timed", variant, texts, ids)
            print(f"  round {number}, {variant}: {run.seconds:.2f} s, CPU {run.cpu_s:.2f} s {run.note}", file=sys.stderr)
            wanted = vectors if wanted is None else wanted
            cosine = float((vectors * wanted).sum(axis=1).min())
            assert cosine >= min_cosine, f"{variant} computes other vectors: cosine {cosine:.6f}"
            runs.setdefault(variant, []).append(run)
        if number == 0:  # chooses: the fastest of each kind; it also warmed all up, and is not counted
            best = {}
            for process, variant in sides:
                key = variant if process.kind is Ours or variant == ST_DEFAULT else process.kind.__name__
                if key not in best or runs[variant][0].cpu_s < runs[best[key][1]][0].cpu_s:
                    best[key] = (process, variant)
            tuned = {side[1]: side for side in best.values()}
            sides, runs = list(tuned.values()), {}
    return runs, sum(len(row) for row in ids)


def table(title: str, runs: dict[str, list[Run]], tokens: int, *, flop_per_token: int, peak: float) -> str:
    head = ("", "tokens/s", "CPU s per 1,000 tokens", "padding", "MFU", "peak memory, GiB", "ours is faster by (CPU time)")
    cells = [head, ("---",) * len(head)]
    for side, own in runs.items():
        rate = statistics.median(tokens / run.seconds for run in own)
        faster = statistics.median(run.cpu_s / our.cpu_s for run, our in zip(own, runs["ours"]))
        cells.append(
            (
                f"{side} ({own[-1].note})" if own[-1].note else side,
                f"{rate:,.0f}",
                f"{statistics.median(1000 * run.cpu_s / tokens for run in own):.3f}",
                f"{1 - tokens / own[-1].positions:.1%}",
                f"{rate * flop_per_token / peak:.1%}",
                f"{max(run.memory_bytes for run in own) / 2**30:.2f}",
                f"{faster:.2f}",
            )
        )
    return markdown(title, cells)


def without_chat(model: str, folder: str) -> str:
    """The model as links in a folder of its own, without chat template: sentence-transformers would put every text into it."""
    os.makedirs(folder)
    for path in Path(model).iterdir():
        if path.name == "tokenizer_config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("chat_template", None)
            Path(folder, path.name).write_text(json.dumps(config), encoding="utf-8")
        elif path.is_file() and not path.name.startswith("chat_template"):
            Path(folder, path.name).symlink_to(path.resolve())
    return folder


def prepare(args: argparse.Namespace, folder: str) -> tuple[str, list[str]]:
    """Folder of the model, and the corpus that texts are cut from: the built-in data set's passages."""
    from smollm2 import make_smollm2

    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.pairs import read_sources
    from ullme_ray.sample_data import ensure_dataset
    from ullme_ray.spec.job import JobSpec, ScratchSpec

    values = {"name": "bench", "storage": folder, "model": {"base": "x"}, "dataset": {"name": "aws_api_docs"}}
    job = JobSpec.model_validate({**values, "train": {"data": [{"path": "run:data/train.jsonl"}]}})
    ensure_dataset(job)
    corpus = sorted({text for pair in read_sources(job)[0].pairs for text in pair.positives})
    assert corpus
    model = args.model or f"{folder}/model"
    if args.quick and not args.model:
        build_scratch(corpus, ScratchSpec(), max_tokens=args.max_tokens, seed=0, folder=model)
    elif not args.model:
        make_smollm2(Path(model))
    return without_chat(model, f"{folder}/plain"), corpus


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a random model of 2 layers in place of SmolLM2-135M")
    parser.add_argument("--model", help="folder of a decoder; absent: SmolLM2-135M, fetched and rebuilt")
    parser.add_argument("--tokens", type=int, default=4_000_000 if gpu else 12_000, help="tokens of a set, about")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that warms up and chooses")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS, help="some of the sets")
    parser.add_argument("--json", help="also write all figures to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    from ullme_ray.model.backbone import DTYPES
    from ullme_ray.model.speed import peak_flops

    args = parse(arguments)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak = max(peak_flops(device, DTYPES[args.dtype]) for _ in range(20))  # of many: a busy machine only ever takes away
    with tempfile.TemporaryDirectory() as folder:
        model, corpus = prepare(args, folder)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        setting = Setting(model, args.max_tokens, args.dtype, args.threads)
        name = Path(args.model).name if args.model else "random, 2 layers of width 256" if args.quick else "SmolLM2-135M"
        print(
            f"{machine()}; {args.threads} threads; {name}, {args.dtype}; peak {peak / 1e12:.2f} TFLOP/s; {args.rounds} rounds\n"
        )
        figures: dict[str, Any] = {"machine": machine(), "setting": asdict(setting), "peak": peak, "sets": {}}
        processes: list[SideProcess] = []
        try:
            processes += [SideProcess(kind, setting) for kind in CONTESTANTS]
            for which in args.only:
                texts = make_texts(corpus, which, args.tokens, tokenizer, max_tokens=args.max_tokens)
                runs, tokens = contest(processes, texts, rounds=args.rounds, min_cosine=_MIN_COSINE[args.dtype])
                flop = 2 * processes[0].num_parameters
                title = f"{which}: {len(texts)} texts, {tokens / len(texts):.0f} tokens each"
                print(table(title, runs, tokens, flop_per_token=flop, peak=peak), flush=True)
                figures["sets"][which] = {"tokens": tokens, "runs": {s: [r._asdict() for r in own] for s, own in runs.items()}}
        finally:
            for process in processes:
                process.close()
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
