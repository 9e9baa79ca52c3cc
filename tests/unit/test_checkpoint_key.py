"""Signed checkpoints, and lists that name what they should not: refused before a single tensor is opened."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import ullme_ray
from ullme_ray.errors import TrainingError
from ullme_ray.spec import JobSpec, parse_job
from ullme_ray.train.checkpoint import _signature, check_resumable, list_checkpoints, training_settings

JOB = b"""
name: a
model: {base: m/m}
train: {data: [{path: x.jsonl}], checkpoint_key: env:TEST_CHECKPOINT_KEY}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    monkeypatch.setenv("TEST_CHECKPOINT_KEY", "a key of this test")
    return parse_job(JOB, overrides=[f"storage={tmp_path}"])


def write(job: JobSpec, *, signed: bool, **changes: Any) -> None:
    """A checkpoint's list as `save_checkpoint` writes it; `changes` are made after it was signed."""
    files = {"state-00001-of-00001.safetensors": {"bytes": 4, "sha256": "00"}}
    manifest = {"step": 5, "files": files, "settings": training_settings(job), "finished": False, "validations": [], "data": ""}
    assert job.train is not None
    assert job.train.checkpoint_key is not None
    if signed:
        manifest["signature"] = _signature(manifest, job.train.checkpoint_key)
    folder = Path(job.storage) / "a" / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text(json.dumps(manifest | changes, indent=1))


def resume(job: JobSpec) -> None:
    (found,) = list_checkpoints(job)
    check_resumable(job, found)


def test_a_signed_checkpoint_is_taken(job: JobSpec) -> None:
    write(job, signed=True)
    resume(job)


def test_one_without_a_signature_is_refused(job: JobSpec) -> None:
    write(job, signed=False)
    with pytest.raises(TrainingError, match=r"is not signed with train\.checkpoint_key = env:TEST_CHECKPOINT_KEY"):
        resume(job)
    resume(parse_job(JOB.replace(b", checkpoint_key: env:TEST_CHECKPOINT_KEY", b""), overrides=[f"storage={job.storage}"]))


@pytest.mark.parametrize(
    "changes", [{"step": 6}, {"files": {"state-00001-of-00001.safetensors": {"bytes": 4, "sha256": "11"}}}]
)
def test_one_that_was_changed_is_refused(changes: dict[str, Any], job: JobSpec) -> None:
    write(job, signed=True, **changes)
    with pytest.raises(TrainingError, match="was changed since"):
        resume(job)


def test_one_signed_with_another_key_is_refused(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    write(job, signed=True)
    monkeypatch.setenv("TEST_CHECKPOINT_KEY", "another key")
    with pytest.raises(TrainingError, match="with another"):
        resume(job)


@pytest.mark.parametrize("name", ["../../other/state.safetensors", "/etc/passwd", "state.bin", "state.pt", "x/y.safetensors"])
def test_a_list_names_tensor_files_of_its_own_folder_only(name: str, job: JobSpec) -> None:
    write(job, signed=True, files={name: {"bytes": 4, "sha256": "00"}})
    with pytest.raises(TrainingError, match="which no checkpoint of ours has"):
        resume(job)


def test_nothing_is_unpickled_that_came_from_a_file() -> None:
    """Pickle passes between our own processes through Ray, in two modules; no file is pickled."""
    users, loaders = set(), set()
    files = sorted(Path(ullme_ray.__file__).parent.rglob("*.py"))
    assert len(files) > 50
    for path in files:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                if names & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}:
                    users.add(path.parent.name + "/" + path.name)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "np.load", "numpy.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if given.get("allow_pickle", "False") != "False" or ast.unparse(node.func) in ("torch.load", "pickle.load"):
                    loaders.add(path.name)
    assert users == {"mine/flow.py", "embed/steps.py"}
    assert loaders == set()
