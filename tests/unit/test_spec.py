"""What a good job file means: defaults, presets, overrides, secrets, paths, the JSON Schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import SecretStr, ValidationError
from ruamel.yaml import YAML

from ullme_ray.cli.files import job_schema
from ullme_ray.errors import JobFileError, UllmeError
from ullme_ray.spec import JobSpec, RunFolder, absolute_paths, load_job, parse_job
from ullme_ray.spec.presets import PRESETS
from ullme_ray.spec.run_folder import dump_job
from ullme_ray.spec.secrets import SecretRef

ROOT = Path(__file__).parents[2]
JOB_FILES = [*sorted((ROOT / "jobs").glob("*.yaml")), ROOT / "ullme_ray" / "starter.yaml"]
TRAIN = "name: docs\nmodel: {base: some/model}\ntrain:\n  data: [{path: pairs.jsonl}]\n"


def parse(text: str, *overrides: str) -> JobSpec:
    return parse_job(text.encode(), overrides=overrides)


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(JobFileError) as caught:
        parse(text, *overrides)
    return [str(problem) for problem in caught.value.problems]


def test_every_problem_is_reported_in_one_go_at_its_own_line() -> None:
    found = problems(
        """name: docs
model: {base: scratch, pooling: maen, scratch: {hidden_size: 100, heads: 7}}
train:
  data:
  - {path: s3://b/x.jsonl, wieght: 2}
  - 5
  - path: gs://b/x
  global_batch_size: 63
  max_steps: "5"
  workers: {num_workers: 2}
  max_steps: 9
embed:
  input: {text: [a, 5]}
  actors: {min: 3, max: 1}
""",
        "storage=gs://x",
    )
    begins = [
        "line 2: model.pooling = 'maen'",
        "line 2: model.scratch.heads = 7",  # a contradiction in a section that has an error
        "line 5: train.data.0.wieght",
        "line 6: train.data.1 = 5",
        "line 7: train.data.2.path = gs://b/x",  # a list item beside broken ones keeps its position
        "line 8: train.global_batch_size = 63",  # in a section with errors in its list
        "line 11: train.max_steps is given twice",  # and no word on '5', for nobody knows which of the two was meant
        "line 13: embed.input.path is missing",
        "line 13: embed.input.text.1 = 5",
        "line 14: embed.actors.min = 3",  # in a section that lacks a required key
        "storage = gs://x",
    ]
    assert len(found) == len(begins)
    for message, begin in zip(found, begins):
        assert message.startswith(begin)


def test_a_broken_section_hides_no_contradiction_elsewhere() -> None:
    found = problems("name: docs\nmodel: 5\ntrain: {data: [{path: x}], global_batch_size: 5, workers: {num_workers: 2}}\n")
    assert [message[:36] for message in found] == [
        "line 2: model = 5 must be a mapping ",
        "line 3: train.global_batch_size = 5 ",
    ]


def test_no_contradiction_is_made_up_from_a_broken_value() -> None:
    """The control: model.lora is unknown while model is broken, so nothing may be said about adapter_off, which needs it."""
    good_model = "name: docs\nmodel: {base: x}\ntrain: {data: [{path: x}], objective: {preset: grl, reference: adapter_off}}\n"
    assert len(problems(good_model)) == 1
    found = problems(good_model.replace("{base: x}", "5"))
    assert len(found) == 1
    assert "line 2: model = 5" in found[0]


def test_yaml_1_2_reads_scalars_as_people_mean_them() -> None:
    job = parse(TRAIN + "  learning_rate: 2e-4\n  weight_decay: 0\n  max_steps: 1_000\nstorage: 2024-01-01\nseed: 010\n")
    assert job.train is not None
    assert job.train.learning_rate == 2e-4
    assert job.train.weight_decay == 0.0
    assert job.train.max_steps == 1000
    assert job.storage == "2024-01-01"
    assert job.seed == 10


def test_byte_order_mark_and_windows_line_ends_are_fine() -> None:
    assert parse_job(b"\xef\xbb\xbf" + TRAIN.replace("\n", "\r\n").encode()) == parse(TRAIN)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fills_the_objective_and_fields_go_over_it(preset: str) -> None:
    short = parse(TRAIN + f"  objective: {preset}\n").train
    long = parse(TRAIN + f"  objective: {{preset: {preset}, temperature: 0.07}}\n").train
    assert short is not None
    assert long is not None
    expected = {"preset": preset, **PRESETS[preset]}
    assert short.objective.model_dump() == expected
    assert long.objective.model_dump() == expected | {"temperature": 0.07}


def test_presets_are_those_of_the_method() -> None:
    weights = {
        name: (p["contrastive_weight"], p["generation_weight"], p["alignment_weight"], p["temperature"], p["generation"])
        for name, p in PRESETS.items()
    }
    assert weights == {
        "cl": (1.0, 0.0, 0.0, 0.05, "sft"),
        "sft": (1.0, 1.0, 0.0, 0.05, "sft"),
        "dpo": (1.0, 0.5, 0.0, 0.05, "dpo"),
        "grl": (1.0, 0.5, 1.0, 0.1, "dpo"),
        "genc": (1.0, 0.5, 1.0, 0.1, "dpo"),
    }
    different = {key: value for key, value in PRESETS["genc"].items() if PRESETS["grl"][key] != value}
    assert different == {
        "contrastive": "supcon",
        "miner_epsilon": 0.2,
        "alignment_direction": "gen_rep",
        "dpo_pairs": "first",
    }


def test_overrides_set_values_sections_and_list_items() -> None:
    job = parse(
        TRAIN,
        "train.max_steps=7",
        "train.objective.temperature=0.02",
        "train.data.0.path=other.jsonl",
        "embed.input.path=corpus",
        "embed.input.text=[title, body]",
        "model.prompts.query='Find: '",
    )
    assert job.train is not None
    assert job.embed is not None
    assert job.train.max_steps == 7
    assert job.train.objective.temperature == 0.02
    assert job.train.data[0].path == "other.jsonl"
    assert job.embed.input.text == ("title", "body")
    assert job.model.prompts.query == "Find: "


def test_override_of_one_field_keeps_a_preset_written_short() -> None:
    job = parse(TRAIN + "  objective: cl\n", "train.objective.temperature=0.02")
    assert job.train is not None
    assert (job.train.objective.preset, job.train.objective.temperature) == ("cl", 0.02)


def test_override_takes_a_section_out() -> None:
    job = parse(TRAIN + "serve: {}\n", "train=null")
    assert job.stages == ("serve",)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nonsense", "write section.key=value"),
        ("a..b=1", "write section.key=value"),
        ("train.max_steps=x", "train.max_steps = 'x' should be a valid integer"),
        ("train.max_step=5", "did you mean max_steps?"),
        ("train.data.3.path=x", "names no item of a list of 1"),
        ("model.prompts.query=Find: it", "not a plain YAML value; quote it"),
        ("storage=!!python/name:os.system x", "not a plain YAML value"),
        ("storage=a\nname: b", "not a plain YAML value"),
    ],
)
def test_bad_override_is_told_from_the_file(override: str, words: str) -> None:
    (message,) = problems(TRAIN, override)
    assert words in message
    assert "(command line)" in message
    assert not message.startswith("line")


def test_bad_override_never_shows_a_secret() -> None:
    (message,) = problems(TRAIN + "serve: {}\n", "serve.api_keys=[sk-live-0815")
    assert "sk-live-0815" not in message


def test_specs_are_frozen() -> None:
    job = parse(TRAIN)
    with pytest.raises(ValidationError):
        job.name = "other"  # type: ignore[misc]


def test_resolved_job_loads_to_an_equal_job_and_keeps_secrets_as_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEYS", "sk-live-0815")
    job = parse(TRAIN + "  objective: {preset: dpo, temperature: 2e-2}\nserve: {api_keys: env:MY_KEYS}\n")
    text = dump_job(job)
    assert parse(text) == absolute_paths(job)
    assert "env:MY_KEYS" in text
    assert "sk-live-0815" not in text + repr(job) + str(job)


@pytest.mark.parametrize("path", JOB_FILES, ids=lambda path: path.name)
def test_job_files_of_the_repository_are_good_and_survive_a_round_trip(path: Path) -> None:
    assert len(JOB_FILES) >= 3
    job = load_job(path)
    assert parse(dump_job(job)) == absolute_paths(job)


def test_secret_shows_only_when_revealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MY_KEY", "sk-live-0815")
    secret = SecretRef("env:MY_KEY").reveal()
    assert secret.get_secret_value() == "sk-live-0815"
    assert str(secret) == "**********"
    (tmp_path / "keys").write_text("one\ntwo, three\n")
    assert SecretRef(f"file:{tmp_path}/keys").reveal_list() == [SecretStr("one"), SecretStr("two"), SecretStr("three")]
    for missing in ("env:NOT_THERE_AT_ALL", f"file:{tmp_path}/none"):
        with pytest.raises(UllmeError, match="cannot be read"):
            SecretRef(missing).reveal()


def test_paths_are_resolved_into_the_run_folder(tmp_path: Path) -> None:
    job = parse(TRAIN, f"storage={tmp_path}")
    run = RunFolder.of(job)
    assert run.resolve("run:data/x") == f"{tmp_path}/docs/data/x"
    assert run.resolve("s3://bucket/x") == "s3://bucket/x"
    assert run.resolve("x") == str(Path.cwd() / "x")
    assert run.resolve("file:///x/y") == "/x/y"


def test_absolute_paths_mean_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    text = """name: docs
model: {base: base, hub_token: file:token}
train: {data: [{path: "a/*.jsonl"}, {path: s3://b/x}]}
evaluate: {local: [{path: sets/x}]}
embed: {input: {path: corpus}}
serve: {api_keys: env:KEYS}
"""
    job = absolute_paths(parse(text))
    assert absolute_paths(job) == job
    monkeypatch.chdir("/")
    assert absolute_paths(job) == job
    assert job.train is not None
    assert job.evaluate is not None
    assert job.embed is not None
    assert job.serve is not None
    found = [job.storage, job.model.base, job.train.data[0].path, job.evaluate.local[0].path, job.embed.input.path]
    assert found == [f"{tmp_path}/{name}" for name in ("runs", "base", "a/*.jsonl", "sets/x", "corpus")]
    assert (job.train.data[1].path, job.embed.output.path) == ("s3://b/x", "run:embeddings")
    assert job.model.hub_token == SecretRef(f"file:{tmp_path}/token")
    assert job.serve.api_keys == SecretRef("env:KEYS")
    assert absolute_paths(parse(text.replace("base: base", "base: hub/name"))).model.base == "hub/name"


def plain(path: Path) -> Any:
    return YAML(typ="safe", pure=True).load(path.read_text())


def test_json_schema_is_valid_and_accepts_the_repository_s_jobs() -> None:
    schema = job_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert len(JOB_FILES) >= 3
    for path in JOB_FILES:
        validator.validate(plain(path))


@pytest.mark.parametrize(
    ("objective", "good"),
    [("grl", True), ({"preset": "cl", "temperature": 0.1}, True), ({}, True), ("gril", False), (5, False)],
)
def test_json_schema_takes_an_objective_by_name_or_as_a_mapping(objective: Any, good: bool) -> None:
    job = {"name": "a", "model": {"base": "x"}, "train": {"data": [{"path": "x"}], "objective": objective}}
    assert jsonschema.Draft202012Validator(job_schema()).is_valid(job) is good


@pytest.mark.parametrize(
    "change",
    [{"nmae": "x"}, {"serve": {"port": "8000"}}, {"serve": {"api_keys": "sk-live"}}, {"train": {}}, {"train": {"data": []}}],
)
def test_json_schema_refuses_what_check_refuses(change: dict[str, Any]) -> None:
    job = {"name": "a", "model": {"base": "x"}, "serve": {}}
    validator = jsonschema.Draft202012Validator(job_schema())
    assert validator.is_valid(job)
    assert not validator.is_valid(job | change)


def test_every_field_has_a_description() -> None:
    """Editors show them, and error messages quote them."""
    schema = job_schema()
    sections = {"JobSpec": schema, **schema["$defs"]}
    for name in ("ObjectiveSpec", "EncoderSpec", "OtherModelSpec", "MtebSpec"):  # for which a name alone may stand
        sections[name] = sections[name]["anyOf"][1]
    fields = {f"{name}.{key}": value for name, section in sections.items() for key, value in section["properties"].items()}
    assert len(fields) > 80
    assert [name for name, field in fields.items() if len(field.get("description", "")) < 10] == []
