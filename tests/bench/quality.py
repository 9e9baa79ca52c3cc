"""What makes the better embedder: strategy, pooling, attention, prompts and hard negatives, one factor at a time.

    python tests/smollm2.py FOLDER && python tests/bench/quality.py FOLDER

Trains a pretrained decoder on real pairs for a few steps and measures nDCG@10 on held-out queries, which are the same
for every run. The set `aws` is the built-in data. For each other one of --sets, --pairs is a folder that holds
`NAME.train.jsonl.gz` and `NAME.test.jsonl.gz` of {"query", "positive"} rows (tests/real_pairs.py makes two). Hard
negatives are BM25's best passages that are not the query's own. A run that is done stands as a line in results.jsonl
and is not done again; all seeds of a few lines come before the next lines. A folder holds runs of the same arguments:
one with others is refused. `--gpu` uses this machine's GPU.

A second table tells what training does to generation, by the measures of ullme_ray/evaluate/generation.py: held-out queries
with their passages and wrong ones, BM25's best where it finds any, scored by the same weights under causal attention.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ullme_ray.evaluate.bm25 import bm25_run
from ullme_ray.evaluate.generation import Candidates, summarise
from ullme_ray.model.backbone import base_folder
from ullme_ray.model.budget import token_budget_batches
from ullme_ray.model.encode import pad_tokens
from ullme_ray.model.encoder import open_tokenizer
from ullme_ray.model.tokenizing import TextTokenizer
from ullme_ray.model.two_pass import TwoPassModel, build_two_pass
from ullme_ray.pairs import read_sources
from ullme_ray.retrieval.local_set import read_local_set
from ullme_ray.retrieval.metrics import Run, score_run
from ullme_ray.retrieval.topk import top_k
from ullme_ray.sample_data import ensure_dataset
from ullme_ray.spec import JobSpec
from ullme_ray.train.collate import Example, collate, generation_batch, shortest_first
from ullme_ray.train.data import BatchSampler
from ullme_ray.train.loop import learning_rate_at
from ullme_ray.train.open_engine import open_engine
from ullme_ray.train.step import train_step

PROMPT = "Find the passage that explains this.\n"
BUILTIN = "aws"
MEASURE = "ndcg@10"
NUM_BOOTSTRAPS = 2000
BATCH_TOKENS = 1024  # of a forward pass of the measurement
NUM_WRONG = 4  # passages beside the right ones of a query whose generation is checked
# The arguments that decide scores; the others decide where, how many and how fast.
DECISIVE: tuple[str, ...] = ("base", "sets", "pairs", "rows", "queries", "passages", "checked")
DECISIVE += ("steps", "batch_size", "learning_rate", "max_tokens", "dtype", "gpu")


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    strategy: str = "cl"  # or base, bm25, another: nothing is trained
    pooling: str = "mean"
    bidirectional: bool = True
    prompts: bool = True
    hard_negatives: bool = True
    temperature: float | None = None  # of the contrastive loss; None: the preset's

    @property
    def is_trained(self) -> bool:
        return self.strategy not in ("base", "bm25", "other")


DEFAULT = Cell()
# All seeds of a group before the next group, so that a cut leaves the most telling comparisons whole.
GROUPS = (
    (DEFAULT, Cell(hard_negatives=False), Cell(prompts=False), Cell(bidirectional=False)),
    (Cell("grl"), Cell("sft"), Cell("dpo"), Cell("genc"), Cell(pooling="lasttoken", bidirectional=False)),
    (Cell("grl", temperature=0.05), Cell(pooling="lasttoken"), Cell(pooling="weightedmean"), Cell(temperature=0.1)),
    (Cell("grl", hard_negatives=False), Cell("grl", pooling="lasttoken", bidirectional=False)),
)
TRAINED = sum(GROUPS, ())
UNTRAINED = (Cell("bm25"), Cell("base"), Cell("base", prompts=False), Cell("base", pooling="lasttoken", bidirectional=False))
OTHER = Cell("other")


@dataclass(frozen=True)
class TestSet:
    """Held-out queries of one kind of pairs, with the passages they search."""

    queries: dict[str, str]
    passages: dict[str, str]
    qrels: dict[str, dict[str, int]]


def read_pairs(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write_builtin_pairs(folder: Path) -> None:
    """The built-in data as a set of its own, `aws`: its training rows and its held-out queries."""
    if (folder / f"{BUILTIN}.test.jsonl.gz").is_file():
        return
    spec = {"name": "data", "storage": str(folder), "dataset": {"name": "aws_api_docs"}, "model": {"base": "scratch"}}
    job = JobSpec.model_validate({**spec, "train": {"data": [{"path": "run:data/train.jsonl"}]}})
    ensure_dataset(job)
    held_out = read_local_set(f"{folder}/data/data/heldout")
    judged = [(query, passage) for query, passages in held_out.qrels.items() for passage in passages]
    rows = {
        "train": [{"query": pair.query, "positive": text} for pair in read_sources(job)[0].pairs for text in pair.positives],
        "test": [{"query": held_out.queries[q], "positive": held_out.passages[p]} for q, p in judged],
    }
    for split, pairs in rows.items():
        with gzip.open(folder / f"{BUILTIN}.{split}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in pairs)


def make_test_set(folder: Path, name: str, num_queries: int, num_passages: int) -> TestSet:
    """The same for every run: queries of the test split, their passages, and others of both splits."""
    generator = np.random.default_rng(0)
    held_out, everything = read_pairs(folder / f"{name}.test.jsonl.gz"), read_pairs(folder / f"{name}.train.jsonl.gz")
    relevant: dict[str, set[str]] = {}
    for row in [*held_out, *everything]:
        relevant.setdefault(row["query"], set()).add(row["positive"])
    texts = sorted({row["query"] for row in held_out})
    chosen = [texts[i] for i in sorted(generator.choice(len(texts), size=num_queries, replace=False))]
    needed = sorted(set().union(*(relevant[text] for text in chosen)))
    rest = sorted({row["positive"] for row in [*held_out, *everything]} - set(needed))
    others = [rest[i] for i in generator.choice(len(rest), size=num_passages - len(needed), replace=False)]
    passages = {f"{name}-{i}": text for i, text in enumerate([*needed, *others])}
    id_of = {text: id_ for id_, text in passages.items()}
    queries = {f"{name}-q{i}": text for i, text in enumerate(chosen)}
    qrels = {id_: {id_of[passage]: 1 for passage in relevant[text]} for id_, text in queries.items()}
    return TestSet(queries, passages, qrels)


def write_training_rows(folder: Path, name: str, target: Path, num_rows: int) -> None:
    """A seeded sample of the training split, each row with its BM25 negatives."""
    rows = read_pairs(folder / f"{name}.train.jsonl.gz")
    chosen = [rows[i] for i in np.random.default_rng(1).choice(len(rows), size=min(num_rows, len(rows)), replace=False)]
    own: dict[str, set[str]] = {}
    for row in rows:
        own.setdefault(row["query"], set()).add(row["positive"])
    passages = {str(i): text for i, text in enumerate(sorted({row["positive"] for row in rows}))}
    found = bm25_run({str(i): row["query"] for i, row in enumerate(chosen)}, passages, 8)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8") as stream:
        for i, row in enumerate(chosen):
            negatives = [passages[id_] for id_ in found[str(i)] if passages[id_] not in own[row["query"]]]
            stream.write(json.dumps({**row, "negatives": negatives[:4]}) + "\n")


def make_job(args: argparse.Namespace, cell: Cell, seed: int) -> JobSpec:
    objective: dict[str, Any] = {"preset": cell.strategy if cell.is_trained else "cl"}
    if cell.temperature is not None:
        objective["temperature"] = cell.temperature
    rows = "hard" if cell.hard_negatives else "plain"
    return JobSpec.model_validate(
        {
            "name": "quality",
            "storage": str(args.folder.resolve()),
            "seed": seed,
            "model": {
                "base": str(Path(args.base).resolve()),
                "max_tokens": args.max_tokens,
                "dtype": args.dtype,
                "pooling": cell.pooling,
                "bidirectional": cell.bidirectional,
                "prompts": {"query": PROMPT if cell.prompts else ""},
                "lora": {"rank": 16, "alpha": 32},
            },
            "train": {
                "objective": objective,
                "data": [{"path": f"{args.folder.resolve()}/{rows}/{name}.jsonl"} for name in args.sets],
                "global_batch_size": args.batch_size,
                "chunk_size": args.chunk_size,
                "max_steps": args.steps,
                "learning_rate": args.learning_rate,
                "max_generation_tokens": 2 * args.max_tokens,
                "deepspeed": {"zero_stage": 0},
                "workers": {"gpus_per_worker": int(args.gpu)},
            },
        }
    )


def run_cell(args: argparse.Namespace, cell: Cell, seed: int, test_sets: Sequence[TestSet]) -> dict[str, Any]:
    """Trains where there is something to train, and measures."""
    start = time.perf_counter()
    runs: list[Run]
    checks: list[dict[str, Any]] = []
    if cell.strategy == "bm25":
        runs = [bm25_run(test_set.queries, test_set.passages, 10) for test_set in test_sets]
    elif cell.strategy == "other":
        runs = other_runs(args.other, test_sets)
    else:
        runs, checks = own_runs(make_job(args, cell, seed), test_sets, train=cell.is_trained, num_checked=args.checked)
    scores = [score_run(test_set.qrels, run, [MEASURE]) for test_set, run in zip(test_sets, runs)]
    return {
        "cell": asdict(cell),
        "seed": seed,
        "made_with": made_with(args, cell),
        "scores": {name: [round(found[MEASURE], 6) for found in per.values()] for name, per in zip(args.sets, scores)},
        "checks": checks,
        "seconds": round(time.perf_counter() - start, 1),
    }


def own_runs(
    job: JobSpec, test_sets: Sequence[TestSet], *, train: bool, num_checked: int
) -> tuple[list[Run], list[dict[str, Any]]]:
    """What each set's queries find, and the values of the generation checks for `num_checked` of them."""
    tokenizer = open_tokenizer(job, which="base")
    module = build_two_pass(base_folder(job), job.model, reference="auto", seed=job.seed)
    engine = open_engine(module, job, 1)
    assert job.train is not None
    if train:
        sampler = BatchSampler(read_sources(job), job.train, seed=job.seed)
        for step in range(job.train.max_steps):
            engine.set_learning_rate(learning_rate_at(step, job.train))
            batch = collate(
                shortest_first(sampler.examples(step, 0, job.train.global_batch_size)),
                tokenizer,
                with_generation=job.train.objective.needs_generation,
                max_generation_tokens=job.train.max_generation_tokens or job.model.max_tokens,
            ).to(engine.device)
            train_step(engine, batch, job.train.objective, chunk_size=job.train.chunk_size, step=step, seed=job.seed)
    module.eval()

    @torch.inference_mode()
    def encode(texts: Sequence[str], prompt: Any) -> np.ndarray:
        """(N, D) float32."""
        tokens = tokenizer.tokenize(texts, prompt)
        vectors = np.empty((len(texts), module.causal_lm.config.hidden_size), np.float32)
        for rows in token_budget_batches([len(ids) for ids in tokens.input_ids], BATCH_TOKENS):
            vectors[rows] = module(pad_tokens(tokens, rows, tokenizer.pad_id).to(engine.device))[0].cpu().numpy()
        return vectors

    runs: list[Run] = []
    checks: list[dict[str, Any]] = []
    for test_set in test_sets:
        queries = encode(list(test_set.queries.values()), "query")
        passages = encode(list(test_set.passages.values()), "passage")
        runs.append(ranked(test_set, queries, passages))
        query_at, passage_at = (
            {text: row for row, text in enumerate(texts.values())} for texts in (test_set.queries, test_set.passages)
        )
        for rows in checked_queries(test_set, num_checked):
            cosines = passages[[passage_at[text] for text in rows.passages]] @ queries[query_at[rows.query]]
            checks.append(check_generation(job, module, tokenizer, rows, cosines))
    return runs, checks


def checked_queries(test_set: TestSet, num_queries: int) -> list[Candidates]:
    """Queries at even distances, each with its passages and the best wrong ones of BM25; others where it finds too few."""
    generator = np.random.default_rng(2)
    ids = list(test_set.queries)
    chosen = {ids[i]: test_set.queries[ids[i]] for i in np.linspace(0, len(ids) - 1, min(num_queries, len(ids))).astype(int)}
    found = bm25_run(chosen, test_set.passages, NUM_WRONG + max(map(len, test_set.qrels.values())))
    rows = []
    for id_, query in chosen.items():
        right = list(test_set.qrels[id_])
        others = generator.permutation(list(test_set.passages)).tolist()
        wrong = [passage for passage in dict.fromkeys([*found[id_], *others]) if passage not in right][:NUM_WRONG]
        passages = tuple(test_set.passages[passage] for passage in [*right, *wrong])
        rows.append(Candidates(query, passages, len(right), len(wrong)))
    return rows


@torch.inference_mode()
def check_generation(
    job: JobSpec, module: TwoPassModel, tokenizer: TextTokenizer, rows: Candidates, cosines: np.ndarray
) -> dict[str, Any]:
    """The values of one query, as `summarise` takes them."""
    assert job.train is not None
    example = Example(0, rows.query, rows.passages, ())
    pairs = [(example, passage) for passage in rows.passages]
    batch = generation_batch(pairs, tokenizer, max_tokens=job.train.max_generation_tokens or job.model.max_tokens)
    logps = module(None, None, batch.to(next(module.parameters()).device))[2]
    return {
        "num_positives": rows.num_positives,
        "num_negatives": rows.num_negatives,
        "cosines": np.round(cosines, 6).tolist(),
        "logps": [round(value, 4) for value in logps.tolist()],
        "lengths": batch.passage_lengths.tolist(),
    }


def other_runs(folder: str, test_sets: Sequence[TestSet]) -> list[Run]:
    """Another maker's model, through sentence-transformers as its folder says."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")

    def encode(texts: dict[str, str]) -> np.ndarray:
        return np.asarray(model.encode(list(texts.values()), normalize_embeddings=True))

    return [ranked(test_set, encode(test_set.queries), encode(test_set.passages)) for test_set in test_sets]


def ranked(test_set: TestSet, queries: np.ndarray, passages: np.ndarray) -> Run:
    hits = top_k(queries, [(np.array(list(test_set.passages)), passages)], 10)
    return {query: dict(best) for query, best in zip(test_set.queries, hits)}


def made_with(args: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """The arguments that decide the scores of a run."""
    found = {name: getattr(args, name) for name in (*DECISIVE, *(["other"] if cell == OTHER else []))}
    return found | {name: str(Path(found[name]).resolve()) for name in ("base", "pairs", "other") if found.get(name)}


def read_results(path: Path, args: argparse.Namespace) -> dict[tuple[Cell, int], dict[str, Any]]:
    """Finished runs by cell and seed; a last line that was cut off is dropped.

    Raises:
        SystemExit: one was made with other arguments.
    """
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        cell = Cell(**record["cell"])
        check_arguments(path, record.get("made_with"), made_with(args, cell))
        found[cell, record["seed"]] = record
    return found


def check_arguments(path: Path, held: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    if held is None:
        raise SystemExit(f"{path} holds runs that do not say with which arguments they were made; give another --folder")
    for name, value in wanted.items():
        if held.get(name) != value:
            raise SystemExit(
                f"{path} holds runs with {name} = {held.get(name)}, not {value}; give the same, or another --folder"
            )


def planned(args: argparse.Namespace) -> Iterator[tuple[Cell, int]]:
    """(cell, seed) in the order of work; what is not trained is measured once, under seed 0."""
    yield from ((cell, 0) for cell in UNTRAINED)
    if args.other:
        yield OTHER, 0
    for group in GROUPS:
        yield from ((cell, seed) for seed in range(1, args.seeds + 1) for cell in group)


def per_query(records: Sequence[dict[str, Any]]) -> np.ndarray:
    """(S, Q): nDCG of every seed and query, all sets one after the other."""
    return np.array([[score for scores in record["scores"].values() for score in scores] for record in records])


def interval(values: np.ndarray, minus: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean and the middle 95 % of its bootstrap, which draws queries and seeds anew, of (S, Q) or of a difference."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(NUM_BOOTSTRAPS):
        queries = generator.integers(values.shape[1], size=values.shape[1])
        drawn = values[generator.integers(len(values), size=len(values))][:, queries].mean()
        if minus is not None:
            drawn -= minus[generator.integers(len(minus), size=len(minus))][:, queries].mean()
        found.append(drawn)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(values.mean() - (0.0 if minus is None else minus.mean())), float(low), float(high)


def table(results: dict[tuple[Cell, int], dict[str, Any]]) -> str:
    """Markdown: a line per cell, with the difference to the default line where both have been run."""
    by_cell: dict[Cell, list[dict[str, Any]]] = {}
    for (cell, _), record in sorted(results.items(), key=lambda item: item[0][1]):
        by_cell.setdefault(cell, []).append(record)
    sets = list(next(iter(results.values()))["scores"])
    lines = [
        f"| strategy | pooling | attention | query prompt | hard negatives | {' | '.join(sets)} | nDCG@10 (95 %) | seeds "
        "| against the default (95 %) |",
        "| --- | --- | --- | --- | --- |" + " ---: |" * (len(sets) + 1) + " --- | --- |",
    ]
    default = per_query(by_cell[DEFAULT]) if DEFAULT in by_cell else None
    for cell in (*UNTRAINED, OTHER, *sorted(TRAINED, key=lambda cell: cell.strategy != "cl")):
        if cell not in by_cell:
            continue
        records = by_cell[cell]
        values = per_query(records)
        mean, low, high = interval(values)
        parts = [f"{np.mean([record['scores'][name] for record in records]):.3f}" for name in sets]
        seeds = " ".join(f"{row.mean():.3f}" for row in values) if cell.is_trained else ""
        against = ""
        if default is not None and cell != DEFAULT:
            against = "{:+.3f} ({:+.3f} to {:+.3f})".format(*interval(values, default))
        lines.append("| " + " | ".join([*names(cell), *parts, f"{mean:.3f} ({low:.3f} to {high:.3f})", seeds, against]) + " |")
    return "\n".join(lines)


def checks_table(results: dict[tuple[Cell, int], dict[str, Any]]) -> str:
    """Markdown: what is left of generation, a line per strategy with everything else as in the default line."""
    measures = ("perplexity", "preference_accuracy", "kendall_tau")
    lines = [
        "| strategy | perplexity of the right passage: mean, seeds | preferred to a wrong one | Kendall tau with the cosine |",
        "| --- | --- | --- | --- |",
    ]
    for strategy in ("base", "cl", "sft", "dpo", "genc", "grl"):
        records = [results[cell, seed] for cell, seed in sorted(results, key=lambda key: key[1]) if cell == Cell(strategy)]
        per_seed = [summarise(record["checks"]) for record in records if record["checks"]]
        if not per_seed:
            continue
        parts = []
        for name in measures:
            values = [found[name] for found in per_seed]
            form = ".1f" if name == "perplexity" else ".3f"
            seeds = " ".join(f"{value:{form}}" for value in values) if len(values) > 1 else ""
            parts.append(f"{np.mean(values):{form}}" + (f" ({seeds})" if seeds else ""))
        lines.append("| " + " | ".join([strategy, *parts]) + " |")
    return "\n".join(lines)


def names(cell: Cell) -> list[str]:
    if cell.strategy in ("bm25", "other"):
        return [cell.strategy, "", "", "", ""]
    strategy = cell.strategy + (f", temperature {cell.temperature}" if cell.temperature is not None else "")
    negatives = ("yes" if cell.hard_negatives else "no") if cell.is_trained else ""
    attention = "both ways" if cell.bidirectional else "causal"
    return [strategy, cell.pooling, attention, "yes" if cell.prompts else "no", negatives]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="folder of the pretrained model")
    parser.add_argument("--sets", nargs="+", default=[BUILTIN], help=f"{BUILTIN} is the built-in data, others are in --pairs")
    parser.add_argument("--pairs", type=Path, help="folder of NAME.train.jsonl.gz and NAME.test.jsonl.gz")
    parser.add_argument("--other", help="folder of a sentence-transformers model to compare with")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where results and training rows go")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--chunk-size", type=int, default=8, help="memory, about 6 GB for grl at 8; never the result")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--queries", type=int, default=100, help="of each set")
    parser.add_argument("--passages", type=int, default=300, help="of each set")
    parser.add_argument(
        "--checked", type=int, default=40, help="of the queries of each set, also for what is left of generation"
    )
    parser.add_argument("--rows", type=int, default=2000, help="training rows drawn from each set")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--gpu", action="store_true", help="run on this machine's GPU")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and train nothing")
    args = parser.parse_args(arguments)
    if args.pairs is None and args.sets != [BUILTIN]:
        parser.error("--pairs is needed for a set that is not built in")
    return args


def pairs_folder(args: argparse.Namespace, name: str) -> Path:
    return Path(args.folder, "pairs") if name == BUILTIN else Path(args.pairs)


def prepare(args: argparse.Namespace) -> None:
    """Writes each set's training rows, with hard negatives and without."""
    if BUILTIN in args.sets:
        write_builtin_pairs(pairs_folder(args, BUILTIN))
    for name in args.sets:
        hard, plain = (args.folder / kind / f"{name}.jsonl" for kind in ("hard", "plain"))
        write_training_rows(pairs_folder(args, name), name, hard, args.rows)
        plain.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.loads(line) for line in hard.read_text(encoding="utf-8").splitlines()]
        plain.write_text("".join(json.dumps({**row, "negatives": []}) + "\n" for row in rows), encoding="utf-8")


def work(args: argparse.Namespace, cell: Cell, seed: int) -> dict[str, Any]:
    """One run, in a process of the pool."""
    torch.set_num_threads(args.threads)
    test_sets = [make_test_set(pairs_folder(args, name), name, args.queries, args.passages) for name in args.sets]
    return run_cell(args, cell, seed, test_sets)


def main() -> None:
    args = parse()
    results_path = args.folder / "results.jsonl"
    done = read_results(results_path, args)
    if not args.table:
        prepare(args)
        with ProcessPoolExecutor(args.at_once, mp_context=get_context("spawn")) as pool:
            runs = [pool.submit(work, args, cell, seed) for cell, seed in planned(args) if (cell, seed) not in done]
            for run in as_completed(runs):
                record = run.result()
                with results_path.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")
                told = f"{Cell(**record['cell'])} seed {record['seed']}: {per_query([record]).mean():.4f}"
                print(f"{told} in {record['seconds']} s", file=sys.stderr, flush=True)
    results = read_results(results_path, args)
    print(table(results), checks_table(results), sep="\n\n")


if __name__ == "__main__":
    main()
