"""`ullme-ray run`: the stages of a job one after the other, then the proof that all of them give the same vectors.

Read `run_job` first. Stages resume by themselves: what is done already is found and not done again.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ullme_ray import logs, storage
from ullme_ray.errors import UllmeError
from ullme_ray.ledger import record, recorded
from ullme_ray.parity import check_parity
from ullme_ray.runtime import check_interrupt, start_ray, wait_for_interrupt
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import ServeSpec
from ullme_ray.spec.run_folder import dump_job

if TYPE_CHECKING:
    from ullme_ray.evaluate.search import Hit
    from ullme_ray.mine import MineReport
    from ullme_ray.serve import Server
    from ullme_ray.train import TrainResult

EXCERPT_CHARS = 200


def chosen_stages(job: JobSpec, names: str | None) -> tuple[str, ...]:
    """`train,embed` -> those stages, in the order in which they run; None means all of the job's.

    Raises:
        UllmeError: the job has no such stage.
    """
    wanted = set(names.split(",")) if names is not None else set(job.stages)
    if unknown := sorted(wanted - set(job.stages)):
        raise UllmeError(f"--stages names {', '.join(unknown)}, which this job does not have; it has {', '.join(job.stages)}")
    return tuple(stage for stage in job.stages if stage in wanted)


def run_job(job: JobSpec, stages: tuple[str, ...] | None = None, *, verbose: bool = False) -> None:
    """Runs stages of a job, on the cluster it names or on a local Ray.

    Args:
        stages: those to run; None means all of the job's.
        verbose: show what Ray and the workers print.

    Raises:
        UllmeError: a stage cannot run or failed, or the stages' vectors differ.
    """
    stages = job.stages if stages is None else stages
    with at_work(job, stages, verbose=verbose):
        for stage in stages:
            check_interrupt()
            _say_stage(stage, stages)
            if stage == "train":
                from ullme_ray.train import run_train

                trained = run_train(job)
                record("train", trained)
                print(describe_training(trained), flush=True)
            elif stage == "evaluate":
                from ullme_ray.evaluate import run_evaluate

                print(run_evaluate(job).to_text(), flush=True)
            elif stage == "embed":
                from ullme_ray.embed import run_embed

                embedded = run_embed(job)
                record("embed", embedded)
                print(embedded.to_text(), flush=True)
        if job.serve and "serve" in stages:
            _serve(job, job.serve)
        else:
            print(_where_everything_lies(job))


@contextlib.contextmanager
def at_work(job: JobSpec, stages: Sequence[str], *, verbose: bool, recorded_in_ledger: bool = True) -> Iterator[None]:
    """What every run of stages begins with: an entry in the ledger, the checks before long work, the run's job.yaml, and Ray.

    Args:
        recorded_in_ledger: False for what only looks, such as a dry run, which leaves job.yaml as it is too.

    Raises:
        UllmeError: the first thing found that would make a stage fail.
    """
    with recorded(job, stages) if recorded_in_ledger else contextlib.nullcontext() as run:
        for note in run.notes if run is not None else ():
            if logs.is_json():
                logs.LOGGER.warning(note)
            else:
                print(f"note: {note}", file=sys.stderr, flush=True)
        prepare(job, stages)
        if recorded_in_ledger:
            storage.write_text(RunFolder.of(job).job_file, dump_job(job))
        with start_ray(job, stages, verbose=verbose):
            yield


def prepare(job: JobSpec, stages: Sequence[str]) -> None:
    """All that can fail early, before anything takes long: storage, model, data, ports and keys of every stage at once.

    Writes the built-in data set, which the stages' own checks look at.

    Raises:
        UllmeError: the first thing found that would make a stage fail.
    """
    storage.check_writable(RunFolder.of(job).root)
    from ullme_ray.model import check_base, encoder_folder
    from ullme_ray.sample_data import ensure_dataset

    if job.train is None or "train" in stages:
        check_base(job)
    elif set(stages) != {"mine"}:  # which checks the encoder that it takes itself
        encoder_folder(job)  # the trained model must be there; its base may be gone
    ensure_dataset(job)
    for stage in stages:
        importlib.import_module(f"ullme_ray.{stage}").preflight(job)


def serve_until_interrupted(server: Server) -> None:
    """Blocks until Ctrl-C or SIGTERM."""
    print(f"serving at {server.url}; Ctrl-C stops", flush=True)
    wait_for_interrupt()
    print("\nstopping the server", file=sys.stderr)


def _serve(job: JobSpec, settings: ServeSpec) -> None:
    from ullme_ray.evaluate.search import search
    from ullme_ray.serve import start_server

    with start_server(job) as server:
        print(f"answers at {server.url}", flush=True)
        for question in job.search.questions:
            print(describe_hits(question, search(job, question, top_k=job.search.top_k, url=server.url)), flush=True)
        if job.embed:
            print(check_parity(job, server.url).to_text(), flush=True)
        print(_where_everything_lies(job), flush=True)
        if settings.keep_running:
            serve_until_interrupted(server)


def describe_training(result: TrainResult) -> str:
    loss = f", last loss {result.final['loss']:.4f}" if result.final else ""
    state = "was trained already" if result.already_done else "trained"
    return f"{state}: {result.steps:,} steps{loss}; model in {result.model}"


def describe_mining(report: MineReport) -> str:
    lines = [
        f"{report.negatives:,} negatives for {report.rows:,} rows ({report.queries:,} queries, {report.passages:,} passages);"
        f" mean score {report.mean_negative_score:.3f}, of positives {report.mean_positive_score:.3f}"
    ]
    if report.rows_short:
        lines.append(
            f"{report.rows_short:,} rows have fewer negatives than asked, {report.rows_without:,} of them none;"
            " lower mine.skip_first, or raise mine.depth"
        )
    left_out = {"training rows": report.rows_rejected, "rows of the corpus": report.corpus_rejected}
    lines += [f"{count:,} {what} could not be used" for what, count in left_out.items() if count]
    return "\n".join([*lines, *(f"written: {path}" for path in report.outputs)])


def describe_hits(question: str, hits: Sequence[Hit]) -> str:
    """A question and its passages, best first, each with score and an excerpt."""
    lines = [f"Q: {question}"]
    for place, hit in enumerate(hits, start=1):
        chunk = f", chunk {hit.chunk}" if hit.chunk else ""
        lines.append(f"  {place}. {hit.score:.3f}  {hit.id}{chunk}")
        lines += textwrap.wrap(_excerpt(hit.columns), width=100, initial_indent=" " * 5, subsequent_indent=" " * 5)
    return "\n".join(lines if hits else [*lines, "  no row found"])


def _excerpt(columns: dict[str, Any]) -> str:
    """The longest text of a row, which is the passage unless the table leaves it out."""
    texts = [value for name, value in columns.items() if isinstance(value, str) and name != "content_hash"]
    return textwrap.shorten(max(texts, key=len, default=""), EXCERPT_CHARS, placeholder=" ...")


def _say_stage(stage: str, stages: Sequence[str]) -> None:
    position = f"{stages.index(stage) + 1}/{len(stages)}"
    print(f"\n== {position} {stage} ==", flush=True)


def _where_everything_lies(job: JobSpec) -> str:
    run = RunFolder.of(job)
    places = {"job file": run.job_file}
    if job.dataset:
        places["data"] = run.data
    if job.train:
        places |= {"model": run.export, "checkpoints": run.checkpoints, "metrics": run.metrics}
    if job.evaluate:
        places["evaluation"] = run.evaluation
    if job.embed:
        places["embeddings"] = run.resolve(job.embed.output.path)
    return "\n".join(["\nEverything lies here:", *(f"  {name:<12} {path}" for name, path in places.items())])
