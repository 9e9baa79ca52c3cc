"""The command line from outside: exit codes, what goes where, and jobs that must fail before any long work."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

import ullme_ray.plan
from ullme_ray.cli import app
from ullme_ray.errors import UllmeError

COMMANDS = ["init", "check", "plan", "run", "train", "mine", "evaluate", "embed", "table", "export", "serve", "search"]
GOOD = "name: docs\nmodel: {base: some/model}\ntrain:\n  data: [{path: pairs.jsonl}]\n"


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(GOOD)
    return path


def test_all_commands_are_there_and_explain_themselves(cli: CliRunner) -> None:
    help_text = cli.invoke(app, ["--help"]).stdout
    for command in COMMANDS:
        assert f"  {command} " in help_text
        result = cli.invoke(app, [command, "--help"])
        assert result.exit_code == 0
        assert "Usage: " in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["check"], ["run"], ["check", "--nonsense"], ["search", "job.yaml"], ["plan", "a", "--top-k", "1"]],
)
def test_wrong_usage_is_2(cli: CliRunner, arguments: list[str]) -> None:
    assert cli.invoke(app, arguments).exit_code == 2


def test_module_and_script_are_the_same_program(job_file: Path) -> None:
    script = Path(sys.executable).with_name("ullme-ray")
    for command in ([sys.executable, "-m", "ullme_ray"], [str(script)]):
        done = subprocess.run([*command, "check", str(job_file)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{job_file} is a good job file: docs runs train\n"


def test_init_writes_a_job_that_check_accepts_and_never_overwrites(cli: CliRunner, job_file: Path) -> None:
    target = job_file.with_name("starter.yaml")
    assert cli.invoke(app, ["init", str(target)]).exit_code == 0
    text = target.read_text()
    assert text.count("#") > 20  # commented
    assert cli.invoke(app, ["check", str(target)]).exit_code == 0
    again = cli.invoke(app, ["init", str(target)])
    assert again.exit_code == 1
    assert "exists" in again.stderr
    assert target.read_text() == text
    nowhere = cli.invoke(app, ["init", str(job_file.with_name("none") / "x.yaml")])
    assert nowhere.exit_code == 1
    assert "No such file or directory" in nowhere.stderr


def test_check_speaks_json_of_good_and_of_bad_files(cli: CliRunner, job_file: Path) -> None:
    good = cli.invoke(app, ["check", str(job_file), "--json", "train.max_steps=7"])
    assert good.exit_code == 0
    assert json.loads(good.stdout)["job"]["train"]["max_steps"] == 7
    bad = cli.invoke(app, ["check", str(job_file), "train.chunk_size=0", "--json"])
    assert bad.exit_code == 2
    found = json.loads(bad.stdout)
    assert found["ok"] is False
    assert found["problems"][0]["where"] == "train.chunk_size"
    assert bad.stderr == ""


def test_schema_is_json_and_valid(cli: CliRunner) -> None:
    schema = json.loads(cli.invoke(app, ["check", "--schema"]).stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"].endswith("2020-12/schema")


@pytest.mark.parametrize("command", ["evaluate", "embed", "serve"])
def test_stage_without_its_section_is_a_bad_job_file(cli: CliRunner, job_file: Path, command: str) -> None:
    result = cli.invoke(app, [command, str(job_file)])
    assert result.exit_code == 2
    assert f"{command} is missing" in result.stderr


def fail_plan_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(job: object) -> None:
        raise error

    monkeypatch.setattr(ullme_ray.plan, "make_plan", fail)


def test_our_errors_have_no_traceback(cli: CliRunner, job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_plan_with(monkeypatch, UllmeError("the moon is not full; wait"))
    result = cli.invoke(app, ["plan", str(job_file)])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: the moon is not full; wait\n")


def test_faults_show_their_traceback(cli: CliRunner, job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_plan_with(monkeypatch, ZeroDivisionError("by accident"))
    result = cli.invoke(app, ["plan", str(job_file)])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError: by accident" in result.stderr
    assert "please report it" in result.stderr


def test_ctrl_c_ends_cleanly_and_says_how_to_resume(cli: CliRunner, job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_plan_with(monkeypatch, KeyboardInterrupt())
    monkeypatch.setattr(sys, "argv", ["ullme-ray", "plan", str(job_file), "name=two words"])
    result = cli.invoke(app, ["plan", str(job_file)])
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    assert f"ullme-ray plan {job_file} 'name=two words'" in result.stderr


# Jobs whose file is good but that cannot run. Each must fail in the checks, before Ray starts or anything is trained.

PAIR = json.dumps({"query": "q", "positive": "p", "negative": "n"}) + "\n"


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield int(server.getsockname()[1])


def run_job(cli: CliRunner, tmp_path: Path, text: str, *overrides: str) -> str:
    """Runs a job that must fail with 1; the message."""
    import ray

    (tmp_path / "job.yaml").write_text(text)
    (tmp_path / "pairs.jsonl").write_text(PAIR * 64)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "t"}) + "\n")
    result = cli.invoke(app, ["run", str(tmp_path / "job.yaml"), f"storage={tmp_path}/runs", *overrides])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    assert not ray.is_initialized()
    assert not (tmp_path / "runs" / "docs" / "checkpoints").exists()
    return result.stderr


def full_job(base: str) -> str:
    return f"""
name: docs
model: {{base: {base}, max_tokens: 64}}
train: {{data: [{{path: pairs.jsonl}}], global_batch_size: 8, max_steps: 1}}
embed: {{input: {{path: corpus.jsonl}}}}
serve: {{port: 0, keep_running: false}}
"""


BROKEN_AT_RUN_TIME = {
    "training data missing": ("train.data.0.path=none.jsonl", "none.jsonl"),
    "training folder empty": ("train.data.0.path=empty/*.jsonl", "empty/*.jsonl"),
    "training data not JSON": ("train.data.0.path=job.yaml", "job.yaml"),
    "corpus missing, two stages later": ("embed.input.path=none.jsonl", "none.jsonl"),
    "corpus of an unknown kind": ("embed.input.path=job.yaml", "job.yaml"),
    "evaluation set missing": ("evaluate.local=[{path: none}]", "none"),
    "model folder missing": ("model.base=./none", "model.base = ./none is not a folder"),
    "model folder without a model": ("model.base=.", "config"),
    "storage is a file": ("storage=job.yaml", "job.yaml"),
    "storage cannot be made": ("storage=/etc/passwd/none", "/etc/passwd/none"),
    "keys not set": ("serve.api_keys=env:ULLME_TEST_NOT_SET", "ULLME_TEST_NOT_SET is not set"),
}


@pytest.mark.parametrize(("override", "words"), BROKEN_AT_RUN_TIME.values(), ids=BROKEN_AT_RUN_TIME)
def test_job_that_cannot_run_says_so_before_any_work(
    cli: CliRunner, tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch, override: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in run_job(cli, tmp_path, full_job(tiny_base), override)


@pytest.mark.parametrize("command", ["evaluate", "embed", "serve"])
def test_stage_that_needs_the_trained_model_says_so_before_ray_starts(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import ray

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", None)
    (tmp_path / "job.yaml").write_text(full_job("scratch") + "evaluate: {local: [{path: heldout}]}\n")
    result = cli.invoke(app, [command, "job.yaml"])
    assert result.exit_code == 1
    assert result.stderr.endswith("holds no trained model yet; run `ullme-ray train` on this job first\n")


def test_taken_port_is_told_before_training(
    cli: CliRunner, tmp_path: Path, tiny_base: str, monkeypatch: pytest.MonkeyPatch, taken_port: int
) -> None:
    monkeypatch.chdir(tmp_path)
    message = run_job(cli, tmp_path, full_job(tiny_base), f"serve.port={taken_port}")
    assert f"serve.port = {taken_port} is in use" in message
