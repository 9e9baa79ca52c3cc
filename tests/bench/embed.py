"""How fast one model embeds on the machine at hand: `python tests/bench/embed.py [--minutes 10] [--quick] [--json FILE]`.

Prints a Markdown table for each of three sets of texts (short, long, mixed lengths), with these sides (embed_sides.py):
- a bare loop as one writes it by hand: length-sorted, padded batches of a token budget, the best of several budgets;
- sentence-transformers' `encode`, with its default batch size, with the best of several, and with several processes;
- ours: `Encoder.embed_tokens` as an actor calls it, its budget found by itself; padded; and from texts, tokenizing included;
- our whole job on Ray: read, tokenize, embed, write, commit.

Equal for all: weights, attention both ways, mean pooling, unit length, texts, dtype, threads; vectors are compared (cosine).
Sides are processes that wait while another runs. They take turns in changing order, so that a drift of the machine meets all
alike; quoted are medians over rounds, and ratios of the same round: of CPU seconds, which a shared machine disturbs least, and
of seconds on a GPU and where several processes work.

Cost: as long as --minutes says, and a minute or two to start; --tokens sets the work instead.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for smollm2
sys.path.insert(0, str(Path(__file__).parent))
from embed_sides import CONTESTANTS, ST_DEFAULT, Run, Setting
from side_process import SideProcess, side_processes
from train_step import machine, markdown

SETS = ("short", "long", "mixed")
# Of the mean over texts: sentence-transformers also pools in the model's type, which one short text may feel.
_MIN_COSINE = {"float32": 0.99999, "bfloat16": 0.99}


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
    processes: dict[str, SideProcess], texts: list[str], *, rounds: int, min_cosine: float
) -> tuple[dict[str, list[Run]], int]:
    """Runs of every side by name, and the tokens of the set. All variants meet once; then the best of each side goes on."""
    sides = [(name, variant) for name in processes for variant in CONTESTANTS[name].variants]
    ids = processes["bare"].call("tokenize", texts)
    runs: dict[str, list[Run]] = {}
    wanted: np.ndarray | None = None
    for number in range(rounds + 1):
        for name, variant in sides if number % 2 else reversed(sides):
            run, vectors = processes[name].call("timed", variant, texts, ids)
            print(f"  round {number}, {variant}: {run.seconds:.2f} s, CPU {run.cpu_s:.2f} s {run.note}", file=sys.stderr)
            wanted = vectors if wanted is None else wanted
            cosine = float((vectors * wanted).sum(axis=1).mean())
            assert cosine >= min_cosine, f"{variant} computes other vectors: cosine {cosine:.6f}"
            runs.setdefault(variant, []).append(run)
        if number == 0:  # chooses: the fastest of each kind; it also warmed all up, and is not counted
            best = {}
            for name, variant in sides:
                key = variant if name == "ours" or variant == ST_DEFAULT else name
                if key not in best or _cost(runs[variant][0]) < _cost(runs[best[key][1]][0]):
                    best[key] = (name, variant)
            tuned = {side[1]: side for side in best.values()}
            sides, runs = list(tuned.values()), {}
    return runs, sum(len(row) for row in ids)


def _cost(run: Run) -> float:
    return run.seconds if torch.cuda.is_available() or math.isnan(run.cpu_s) else run.cpu_s


def _faster(run: Run, ours: Run) -> float:
    """How much faster ours was, by CPU time where that tells."""
    return run.seconds / ours.seconds if _cost(run) == run.seconds else run.cpu_s / ours.cpu_s


def table(title: str, runs: dict[str, list[Run]], tokens: int, *, flop_per_token: int, peak: float) -> str:
    head = ("", "tokens/s", "CPU s per 1,000 tokens", "padding", "MFU", "peak memory, GiB", "time / ours")
    cells = [head, ("---",) * len(head)]
    for side, own in runs.items():
        rate = statistics.median(tokens / run.seconds for run in own)
        faster = statistics.median(_faster(run, our) for run, our in zip(own, runs["ours"]))
        cpu_s = statistics.median(1000 * run.cpu_s / tokens for run in own)
        memory = max(run.memory_bytes for run in own) / 2**30
        cells.append(
            (
                f"{side} ({own[-1].note})" if own[-1].note else side,
                f"{rate:,.0f}",
                "" if math.isnan(cpu_s) else f"{cpu_s:.3f}",
                f"{1 - tokens / own[-1].positions:.1%}" if own[-1].positions else "",
                f"{rate * flop_per_token / peak:.1%}",
                f"{memory:.2f}" if memory else "",
                f"{faster:.2f}",
            )
        )
    return markdown(title, cells)


def tokens_for(minutes: float, processes: dict[str, SideProcess], texts: list[str], *, num_sets: int, rounds: int) -> int:
    """Tokens of a set that let the whole contest take about so long, by how fast our side embeds these texts."""
    ids = processes["bare"].call("tokenize", texts)
    run = min((processes["ours"].call("timed", "ours", texts, ids)[0] for _ in range(3)), key=lambda run: run.seconds)
    rate = sum(len(row) for row in ids) / run.seconds
    variants = sum(len(CONTESTANTS[name].variants) for name in processes)
    work = 2.0 * variants + 1.5 * rounds * (len(processes) + 3)  # in runs of our side; of some kinds two variants go on
    return round(60.0 * minutes * rate / work / num_sets)


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a random model of 2 layers in place of SmolLM2-135M")
    parser.add_argument("--model", help="folder of a decoder; absent: SmolLM2-135M, fetched and rebuilt")
    parser.add_argument("--minutes", type=float, default=10.0, help="that the contest takes, about; sets the tokens of a set")
    parser.add_argument("--tokens", type=int, help="of a set, about, whatever time that takes")
    parser.add_argument("--max-tokens", type=int, default=512, help="of a text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds, after one that warms up and chooses")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", nargs="+", choices=SETS, default=SETS, help="some of the sets")
    parser.add_argument(
        "--sides", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), help="beside ours and the bare loop"
    )
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
        wanted = {name: partial(kind, setting) for name, kind in CONTESTANTS.items() if name in {"ours", "bare", *args.sides}}
        with side_processes(wanted, threads=args.threads) as processes:
            for process in processes.values():
                process.call("settle")
            flop = 2 * processes["bare"].call("parameters")
            probe = make_texts(
                corpus, "mixed", 200_000 if device.type == "cuda" else 1_500, tokenizer, max_tokens=args.max_tokens
            )
            size = args.tokens or tokens_for(args.minutes, processes, probe, num_sets=len(args.only), rounds=args.rounds)
            for which in args.only:
                texts = make_texts(corpus, which, size, tokenizer, max_tokens=args.max_tokens)
                runs, tokens = contest(processes, texts, rounds=args.rounds, min_cosine=_MIN_COSINE[args.dtype])
                title = f"{which}: {len(texts)} texts, {tokens / len(texts):.0f} tokens each"
                print(table(title, runs, tokens, flop_per_token=flop, peak=peak), flush=True)
                figures["sets"][which] = {"tokens": tokens, "runs": {s: [r._asdict() for r in own] for s, own in runs.items()}}
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
