"""Our server and infinity-emb under the same load, one after the other: `python tests/bench/serve.py [--quick] [--json FILE]`.

For each of three sets of texts (short, long, mixed lengths; one text a request) a closed loop of 1 to 64 clients that ask again
once answered, then an open loop at 0.5, 2 and 8 times the rate at which the model embeds these texts offline, whatever comes
back. Prints Markdown tables:
- requests/s and tokens/s of answers with status 200 that came in time, p50, p95 and p99 of these answers, refusals (429), what
  was unanswered when the load ended, errors;
- a lone client beside the bare model, tokenizing included: what the server adds; tokens/s at saturation beside the offline rate
  of embed's own code; goodput at 8 times the capacity beside the peak;
- with --adapters, what it costs that rows of two adapters never share a forward pass.

Equal for both: weights (causal attention, for older transformers ignore `is_causal: false`), texts, dtype, threads of the
model; vectors are compared first (cosine). A server runs alone while it is measured. The offline rate is measured before and
after: where the two differ much, the machine was not quiet.

Cost, by its settings: about 4 minutes per set with --seconds 8, two of them for infinity to work off the load of 8 times its
capacity.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for smollm2
sys.path.insert(0, str(Path(__file__).parent))
from embed import SETS, make_texts
from serve_load import UNANSWERED, Answer, Load
from serve_sides import NAME, Infinity, Ours, Setting, Side, make_infinity
from train_step import machine, markdown

OVERLOADS = (0.5, 2.0, 8.0)  # x the offline rate
NUM_TEXTS = 512  # of a set, then again from the first
MIN_COSINE = {"float32": 0.9999, "bfloat16": 0.99}
WARM_SHARE = 0.1  # of a load, not counted
SETTLED_S = 60.0  # for a server to work off a load that is over


@dataclass(frozen=True)
class Line:
    """One load on one server."""

    texts: str
    load: str
    server: str
    requests_per_s: float
    tokens_per_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    answered: int
    refused: int
    unanswered: int
    errors: int


class Clients:
    """The process that sends."""

    def __enter__(self) -> Clients:
        script = Path(__file__).with_name("serve_load.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def send(self, load: Load) -> list[Answer]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        self._process.stdin.flush()
        return [Answer(*values) for values in json.loads(self._process.stdout.readline())]


def line_of(names: tuple[str, str, str], answers: Sequence[Answer], num_tokens: Sequence[int], seconds: float) -> Line:
    """What came between the warm-up and the end; refusals and errors of the whole load."""
    fine = [a for a in answers if a.status == 200]
    good = [a for a in fine if WARM_SHARE * seconds < a.ended_s <= seconds]
    took = [1000 * a.took_s for a in good]
    # Answers of a batch come together, so what is counted begins and ends behind such a burst.
    begin, end = _end_of_burst(fine, 0.0, seconds / 3), _end_of_burst(fine, 2 * seconds / 3, seconds)
    if begin is not None and end is not None:
        counted, span = fine[begin + 1 : end + 1], fine[end].ended_s - fine[begin].ended_s
    else:
        counted, span = good, (1 - WARM_SHARE) * seconds
    p50, p95, p99 = np.percentile(took, [50, 95, 99]).tolist() if took else (None, None, None)
    others = [a.status for a in answers if a.status not in (200, 429, UNANSWERED)]
    return Line(
        *names,
        requests_per_s=len(counted) / span,
        tokens_per_s=sum(num_tokens[a.text] for a in counted) / span,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        answered=len(good),
        refused=sum(a.status == 429 for a in answers),
        unanswered=sum(a.status == UNANSWERED for a in answers),
        errors=len(others),
    )


def _end_of_burst(answers: Sequence[Answer], start_s: float, stop_s: float) -> int | None:
    """Number of the answer within these seconds after which the next took longest to come."""
    ends = [answer.ended_s for answer in answers]
    pauses = [(b - a, number) for number, (a, b) in enumerate(itertools.pairwise([*ends, math.inf])) if start_s < a <= stop_s]
    return max(pauses)[1] if pauses else None


class Bench:
    """The model at hand, the sets of texts, and what was measured so far."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        from ullme_ray.model import open_encoder
        from ullme_ray.spec.job import JobSpec

        self.args = args
        model, corpus = prepare(args, folder)
        self.setting = Setting(model, args.max_tokens, args.dtype, args.threads, folder)
        spec = {"base": model, "dtype": args.dtype, "max_tokens": args.max_tokens, "bidirectional": False}
        self.encoder = open_encoder(JobSpec.model_validate({"name": NAME, "model": spec}), device=args.device)
        self.budget = self.encoder.find_budget()
        tokenizer = self.encoder.tokenizer.hf
        self.texts: dict[str, list[str]] = {}
        self.num_tokens: dict[str, list[int]] = {}
        for name in args.only:
            texts = make_texts(corpus, name, 10**6 if args.device == "cuda" else 10**5, tokenizer, max_tokens=args.max_tokens)
            self.texts[name] = texts[:NUM_TEXTS]
            tokens = self.encoder.tokenizer.tokenize(self.texts[name], "passage")
            self.num_tokens[name] = [len(ids) for ids in tokens.input_ids]
        self.offline: dict[str, list[float]] = {name: [] for name in args.only}  # tokens/s
        self.lone: dict[str, dict[str, list[float]]] = {name: {} for name in args.only}  # ms of the first texts, in turn
        self.lines: list[Line] = []

    def measure_model(self) -> None:
        """The offline rate of embed's own code and, the first time, single texts: tokenizing and forward."""
        for name, texts in self.texts.items():
            rates, at, end = [], 0, time.perf_counter() + self.args.seconds / 2
            while time.perf_counter() < end or not rates:
                some = texts[at : at + 64]
                began = time.perf_counter()
                self.encoder.embed_tokens(self.encoder.tokenizer.tokenize(some, "passage"), tokens_per_batch=self.budget)
                rates.append((sum(self.num_tokens[name][at : at + 64]), time.perf_counter() - began))
                at = (at + 64) % (len(texts) // 64 * 64)
            self.offline[name].append(sum(n for n, _ in rates) / sum(s for _, s in rates))
            if "model" not in self.lone[name]:
                took, end = [], time.perf_counter() + self.args.seconds / 2
                while time.perf_counter() < end and len(took) < len(texts):
                    began = time.perf_counter()
                    self.encoder.encode(texts[len(took) : len(took) + 1])
                    took.append(1000 * (time.perf_counter() - began))
                self.lone[name]["model"] = took

    def check_vectors(self, side: Side) -> None:
        texts = [text for own in self.texts.values() for text in own[:4]]
        body = {"model": NAME, "input": texts, "encoding_format": "float"}
        answer = httpx.post(side.url, json=body, timeout=300, trust_env=False).raise_for_status().json()
        cosine = float((np.array([row["embedding"] for row in answer["data"]]) * self.encoder.encode(texts)).sum(1).min())
        assert cosine >= MIN_COSINE[self.args.dtype], f"{side.name} computes other vectors: cosine {cosine:.6f}"

    def measure(self, side: Side, clients: Clients) -> None:
        """All loads on a server that runs."""
        self.check_vectors(side)
        for name, texts in self.texts.items():
            capacity = self.offline[name][0] / np.mean(self.num_tokens[name])
            loads = [(f"{n} client{'s' if n > 1 else ''}", {"clients": n}) for n in self.args.clients]
            loads += [(f"open, {x:g}x", {"rate": x * capacity}) for x in OVERLOADS]
            # Lengths as those to come, so that memory and kernels are there; not counted.
            clients.send(Load(side.url, texts[-64:], 2.0, [NAME], clients=8))
            for load, how in loads:
                seconds = self.args.seconds
                answers = clients.send(Load(side.url, texts, seconds, [NAME], **how))
                self.lines.append(line_of((name, load, side.name), answers, self.num_tokens[name], seconds))
                if how.get("clients") == 1:
                    self.lone[name][side.name] = [1000 * a.took_s for a in answers if a.status == 200][: len(texts)]
                print(f"  {self.lines[-1]}", file=sys.stderr, flush=True)
                self._settle(side, name, clients)

    def _settle(self, side: Side, name: str, clients: Clients) -> None:
        """Until a lone request is answered about as fast as one that met an idle server."""
        idle_ms = np.max(self.lone[name].get(side.name, [5000.0]))
        deadline = time.monotonic() + SETTLED_S
        while time.monotonic() < deadline:
            (answer,) = clients.send(Load(side.url, self.texts[name][:1], 1.0, [NAME], clients=1, requests=1))
            if answer.status == 200 and 1000 * answer.took_s < 1.5 * idle_ms + 5:
                return
            time.sleep(0.2)
        print(f"  {side.name} is still busy", file=sys.stderr, flush=True)

    def measure_adapters(self, clients: Clients) -> None:
        """16 clients, mixed texts: one name for all, and three in turn."""
        folders = {
            name: make_adapter(self.setting.model, f"{self.setting.folder}/{name}", seed) for seed, name in enumerate("ab")
        }
        with Ours(self.setting, adapters=folders, gpus=self.gpus) as side:
            for load, models in (("one adapter", ["a"]), ("base and two adapters in turn", [NAME, "a", "b"])):
                name, seconds = self.args.only[-1], self.args.seconds
                clients.send(Load(side.url, self.texts[name][-64:], 2.0, models, clients=8))
                answers = clients.send(Load(side.url, self.texts[name], seconds, models, clients=16))
                self.lines.append(line_of((name, f"16 clients, {load}", side.name), answers, self.num_tokens[name], seconds))
                print(f"  {self.lines[-1]}", file=sys.stderr, flush=True)

    @property
    def gpus(self) -> float:
        return 1.0 if self.args.device == "cuda" else 0.0

    def tables(self) -> str:
        parts = []
        for name in self.texts:
            head = ("load", "server", "requests/s", "tokens/s", "p50, ms", "p95", "p99", "refused", "unanswered", "errors")
            cells = [head, ("---",) * len(head)]
            for line in sorted((line for line in self.lines if line.texts == name), key=lambda line: self._order(line.load)):
                times = ["" if ms is None else f"{ms:,.0f}" for ms in (line.p50_ms, line.p95_ms, line.p99_ms)]
                rates = (f"{line.requests_per_s:.1f}", f"{line.tokens_per_s:,.0f}")
                cells.append((line.load, line.server, *rates, *times, *map(str, (line.refused, line.unanswered, line.errors))))
            parts.append(markdown(f"{name} texts, {np.mean(self.num_tokens[name]):.0f} tokens each", cells))
        return "\n".join([*parts, self._summary()])

    def _order(self, load: str) -> int:
        return list(dict.fromkeys(line.load for line in self.lines)).index(load)

    def _summary(self) -> str:
        head = ("texts", "server", "lone request, ms", "bare model", "more by", "peak / offline rate", "at 8x / peak")
        cells = [head, ("---",) * len(head)]
        for name, server in itertools.product(self.texts, dict.fromkeys(line.server for line in self.lines)):
            own = {line.load: line for line in self.lines if (line.texts, line.server) == (name, server)}
            both = list(zip(self.lone[name]["model"], self.lone[name].get(server, []), strict=False))
            if not both:
                continue
            bare, lone = (float(np.median(values)) for values in zip(*both, strict=True))
            peak = max(line.tokens_per_s for line in own.values())
            rate = float(np.mean(self.offline[name]))
            overload = own[f"open, {OVERLOADS[-1]:g}x"].tokens_per_s
            shares = (f"{peak / rate:.1%}", f"{overload / peak:.1%}")
            cells.append((name, server, f"{lone:.1f}", f"{bare:.1f}", f"{lone - bare:.1f}", *shares))
        offline = "; ".join(f"{name} {' and '.join(f'{rate:,.0f}' for rate in own)}" for name, own in self.offline.items())
        return markdown("the server beside the bare model", cells) + f"\nOffline, tokens/s before and after: {offline}.\n"


def prepare(args: argparse.Namespace, folder: str) -> tuple[str, list[str]]:
    """The served model as a sentence-transformers folder, and the corpus that texts are cut from."""
    from smollm2 import make_smollm2

    from ullme_ray.model.backbone import load_backbone
    from ullme_ray.model.export import export_encoder
    from ullme_ray.model.scratch import build_scratch
    from ullme_ray.model.tokenizing import load_tokenizer
    from ullme_ray.pairs import read_sources
    from ullme_ray.sample_data import ensure_dataset
    from ullme_ray.spec.job import JobSpec, ScratchSpec

    base = args.model or f"{folder}/base"
    values = {"name": NAME, "storage": folder, "dataset": {"name": "aws_api_docs"}}
    values["model"] = {"base": base, "dtype": args.dtype, "max_tokens": args.max_tokens, "bidirectional": False}
    job = JobSpec.model_validate({**values, "train": {"data": [{"path": "run:data/train.jsonl"}]}})
    ensure_dataset(job)
    corpus = sorted({text for pair in read_sources(job)[0].pairs for text in pair.positives})
    assert corpus
    if args.layers and not args.model:
        shape = ScratchSpec(hidden_size=args.width, layers=args.layers, heads=args.width // 32)
        build_scratch(corpus, shape, max_tokens=args.max_tokens, seed=0, folder=base)
    elif not args.model:
        make_smollm2(Path(base))
    export = f"{folder}/export"
    os.makedirs(export)
    export_encoder(load_backbone(base, job.model), load_tokenizer(base), job, export, training={})
    Path(export, "chat_template.jinja").unlink(missing_ok=True)  # sentence-transformers would put every text into it
    config = json.loads(Path(export, "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.get("rope_parameters", {}).get("rope_theta", 10_000.0)  # where transformers 4 looks for it
    Path(export, "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return export, corpus


def make_adapter(model: str, folder: str, seed: int) -> str:
    import peft

    from ullme_ray.model.backbone import load_backbone
    from ullme_ray.spec.job import ModelSpec

    torch.manual_seed(seed)
    wrapped: Any = peft.get_peft_model(
        load_backbone(model, ModelSpec(base=model)), peft.LoraConfig(target_modules="all-linear")
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    wrapped.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def infinity_environment(folder: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as own:
        place = Path(folder or own)
        make_infinity(place)
        yield place


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a random decoder of 2 layers, 3 s a load, short texts")
    parser.add_argument("--model", help="folder of a decoder; absent: SmolLM2-135M, fetched and rebuilt")
    parser.add_argument("--layers", type=int, default=0, help="a random decoder of so many layers instead")
    parser.add_argument("--width", type=int, default=384, help="of its layers")
    parser.add_argument("--max-tokens", type=int, default=512 if gpu else 256, help="of a text")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1), help="of the model on a CPU")
    parser.add_argument("--seconds", type=float, default=8.0, help="that a load lasts")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64], help="of the closed loops; 1 must be the first")
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="some of the sets")
    parser.add_argument("--adapters", action="store_true", help="also what adapters cost")
    parser.add_argument("--infinity", metavar="FOLDER", help="a virtual environment with infinity-emb; made there if absent")
    parser.add_argument("--alone", action="store_true", help="without infinity-emb")
    parser.add_argument("--json", help="also write all figures to this file")
    parser.add_argument("--report", metavar="RUN_FOLDER", help="also write serve_bench.json there, for `ullme-ray report`")
    args = parser.parse_args(arguments)
    args.device = "cuda" if gpu else "cpu"
    if args.clients[0] != 1:
        parser.error("--clients must begin with 1: a lone client tells when a server is idle again")
    if args.quick:
        args.layers, args.width, args.seconds, args.only = 2, 256, 3.0, ["short"]
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    from ullme_ray.runtime import quiet_libraries

    args = parse(arguments)
    quiet_libraries()
    torch.set_num_threads(args.threads)
    with contextlib.ExitStack() as stack:
        environment = None if args.alone else stack.enter_context(infinity_environment(args.infinity))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        bench = Bench(args, folder)
        clients = stack.enter_context(Clients())
        name = f"random decoder, {args.layers} layers of width {args.width}" if args.layers else "SmolLM2-135M"
        name = Path(args.model).name if args.model else name
        print(
            f"{machine()}; {os.cpu_count()} cores, {args.threads} for the model; {name}, {args.dtype};"
            f" {args.seconds:g} s a load\n",
            flush=True,
        )
        bench.measure_model()
        sides: list[Side] = [Ours(bench.setting, gpus=bench.gpus)]
        if environment is not None:
            sides.append(Infinity(bench.setting, environment, device=args.device))
        for side in sides:
            with side:
                bench.measure(side, clients)
                print(f"  {side.name}: {side.memory_bytes() / 2**30:.2f} GiB", file=sys.stderr)
        if args.adapters:
            bench.measure_adapters(clients)
        bench.measure_model()
        print(bench.tables(), flush=True)
    lines = [asdict(line) for line in bench.lines]
    if args.json:
        figures = {
            "machine": machine(),
            "arguments": vars(args),
            "offline": bench.offline,
            "lone_ms": bench.lone,
            "lines": lines,
        }
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if args.report:
        Path(args.report, "serve_bench.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
