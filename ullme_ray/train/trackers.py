"""W&B and MLflow, where the job asks for them: the records of train.jsonl, sent by the driver, so that no rank ever waits.

Nothing leaves the machine unasked, and neither secrets nor the environment are sent. Where to send, and with which key, is said
by the clients' own variables (WANDB_API_KEY, WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME ...).
The ids of the runs lie in metrics/trackers.json, so that a resumed run goes on in the same place.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from ullme_ray import storage
from ullme_ray.errors import TrainingError
from ullme_ray.report.curves import read_records
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder
from ullme_ray.train.checkpoint import training_settings

_PROJECT = "ullme-ray"  # where the client's own variables name no project or experiment
_PACKAGES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # the full mlflow of today asks for an older pyarrow than we do
_MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # its own: minutes
_PARAMS_PER_CALL = 100  # as many as MLflow takes


class Tracker(Protocol):
    """One service. `sent_to` is the last step that it holds already."""

    run_id: str
    where: str
    sent_to: int

    def write(self, step: int, figures: dict[str, float]) -> None: ...

    def close(self, *, ok: bool) -> None: ...


class _Wandb:
    def __init__(self, job: JobSpec, run_id: str | None) -> None:
        import wandb

        folder = RunFolder.of(job).metrics
        keeps_here = not storage.is_remote(folder) and "WANDB_DIR" not in os.environ
        if keeps_here:
            os.makedirs(folder, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            name=os.environ.get("WANDB_NAME") or job.name,
            id=run_id or uuid.uuid4().hex,
            resume="allow",
            config=training_settings(job),
            dir=folder if keeps_here else None,
            settings=wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True, x_disable_meta=True),
        )
        self.run_id = str(self._run.id)
        offline = bool(self._run.settings.mode == "offline")
        self.where = f"{self._run.dir.removesuffix('/files')} (offline)" if offline else str(self._run.url)
        self.sent_to = self._run.step - 1  # of a run that went on at the service; an offline folder gets all from the start

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self, *, ok: bool) -> None:
        self._run.finish(exit_code=0 if ok else 1)


class _Mlflow:
    def __init__(self, job: JobSpec, run_id: str | None) -> None:
        from mlflow.entities import Param

        self._client = _mlflow_client()
        if run_id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
            experiment = self._client.get_experiment_by_name(name)
            experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self.run_id = str(self._client.create_run(experiment_id, run_name=job.name).info.run_id)
            params = [Param(key, str(value)[:500]) for key, value in training_settings(job).items()]
            for start in range(0, len(params), _PARAMS_PER_CALL):
                self._client.log_batch(self.run_id, params=params[start : start + _PARAMS_PER_CALL])
            self.sent_to = -1
        else:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            self.sent_to = max((m.step for m in self._client.get_metric_history(run_id, "loss")), default=-1)
        self.where = f"run {self.run_id} at {self._client.tracking_uri}"

    def write(self, step: int, figures: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(key, value, now_ms, step) for key, value in figures.items()])

    def close(self, *, ok: bool) -> None:
        self._client.set_terminated(self.run_id, status="FINISHED" if ok else "FAILED")


_KINDS: dict[str, Callable[[JobSpec, str | None], Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}


class Trackers:
    """All services of a job, for the length of a `with` block.

    A service that fails while training runs is left out from then on, with a note: records are never lost, for they stand in
    train.jsonl, and what a service misses is sent when the run resumes.

    Args:
        note: gets sentences for a person.
        steps_done: of the checkpoint that the run resumes from; records up to there are sent where they are missing.

    Raises:
        TrainingError: a service cannot be started.
    """

    def __init__(self, job: JobSpec, note: Callable[[str], None], *, steps_done: int) -> None:
        assert job.train is not None
        self._note = note
        self._open: dict[str, Tracker] = {}
        self._sent: dict[tuple[str, str], int] = {}  # (service, figure) -> last step; ranks that restart repeat steps
        if not job.train.trackers:
            return
        folder = RunFolder.of(job).metrics
        path = storage.join(folder, "trackers.json")
        ids = json.loads(storage.read_text(path)) if storage.exists(path) else {}
        for name in dict.fromkeys(job.train.trackers):
            try:
                tracker = self._open[name] = _KINDS[name](job, ids.get(name))
            except Exception as error:
                self._close(ok=False)
                known = f" (its run is {ids[name]}; remove {path} to begin another)" if name in ids else ""
                raise TrainingError(
                    f"train.trackers: {name} cannot be started{known}: {_reason(error)}; or remove {name}"
                ) from error
            ids[name] = tracker.run_id
            note(f"{name}: {tracker.where}")
        storage.write_text(path, json.dumps(ids))
        for record in read_records(folder):
            if record["step"] <= steps_done:
                self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Sends the numbers of one record, whatever their names are."""
        step = int(record["step"])
        for name, tracker in list(self._open.items()):
            figures = {
                key: float(value)
                for key, value in record.items()
                if key != "step" and isinstance(value, int | float) and step > self._sent.get((name, key), tracker.sent_to)
            }
            if not figures:
                continue
            try:
                tracker.write(step, figures)
            except Exception as error:  # noqa: BLE001 - the clients raise many kinds, and none may stop a training run
                self._leave_out(name, f"takes nothing from step {step} on ({_reason(error)})")
            self._sent |= {(name, key): step for key in figures}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close(ok=kind is None)

    def _close(self, *, ok: bool) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.close(ok=ok)
            except Exception as error:  # noqa: BLE001 - as above
                self._leave_out(name, f"could not be closed ({_reason(error)})")
        self._open.clear()

    def _leave_out(self, name: str, why: str) -> None:
        del self._open[name]
        self._note(f"{name} {why}; every record is in metrics/train.jsonl")


def check_trackers(job: JobSpec) -> None:
    """Before long work: is each service's client installed, and may it send?

    Raises:
        TrainingError: with the way out.
    """
    assert job.train is not None
    for name in dict.fromkeys(job.train.trackers):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # no origin: a folder called wandb, such as the one W&B itself makes
            raise TrainingError(
                f"train.trackers names {name}, which is not installed here, where the job is started;"
                f" pip install {_PACKAGES[name]}, or remove it"
            )
    if "wandb" in job.train.trackers:
        _check_wandb()
    if "mlflow" in job.train.trackers:
        try:
            _mlflow_client().search_experiments(max_results=1)
        except Exception as error:
            raise TrainingError(
                f"train.trackers: mlflow cannot be used ({_reason(error)}); set MLFLOW_TRACKING_URI to a server that answers,"
                " or remove mlflow"
            ) from error


def _check_wandb() -> None:
    import wandb

    why = "it has no API key"
    try:
        ready = wandb.setup().settings.mode != "online" or wandb.login()
    except Exception as error:  # noqa: BLE001 - its kinds of errors are many
        ready, why = False, _reason(error)
    if not ready:
        raise TrainingError(
            f"train.trackers: wandb cannot be used ({why}); set WANDB_API_KEY where the job is started, or WANDB_MODE=offline"
            " to keep its files here, or remove wandb"
        )


def _mlflow_client() -> Any:
    for name, value in _MLFLOW_PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    return MlflowClient()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
