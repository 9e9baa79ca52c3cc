"""Job files that are wrong, one way each: what the message must say, on which line, and exit code 2 of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ullme_ray.cli import app
from ullme_ray.errors import JobFileError
from ullme_ray.spec import load_job
from ullme_ray.spec.yaml_tree import MAX_DEPTH, MAX_JOB_FILE_BYTES

HEAD = "name: docs\nmodel: {base: some/model}\n"  # lines 1 and 2; what is broken begins on line 3
TRAIN = HEAD + "train:\n  data: [{path: pairs.jsonl}]\n"  # lines 3 and 4
EMBED = HEAD + "embed:\n  input: {path: corpus.jsonl}\n"
SERVE = HEAD + "serve:\n"


@dataclass(frozen=True)
class Broken:
    content: str | bytes
    line: int | None
    words: tuple[str, ...]  # all of them in the one problem on that line
    never: str = "\0"  # what no message may show


BROKEN = {
    # Not readable as YAML at all.
    "empty": Broken("", 1, ("is empty", "mapping of sections")),
    "comments only": Broken("# nothing\n", 1, ("is empty",)),
    "list at the top": Broken("- name: a\n", 1, ("must be a mapping of sections",)),
    "text at the top": Broken("docs-search\n", 1, ("must be a mapping of sections",)),
    "two documents": Broken(TRAIN + "---\nname: b\n", 5, ("second YAML document",)),
    "tab indentation": Broken("name: docs\nmodel:\n\tbase: x\n", 3, ("not valid YAML", "a tab", "use spaces")),
    "unclosed bracket": Broken(HEAD + "train: {data: [1, 2\n", 4, ("not valid YAML",)),
    "colon inside plain text": Broken("name: docs\nmodel: {base: a}\nstorage: x: y\n", 3, ("mapping values are not allowed",)),
    "control character": Broken("name: docs\nstorage: a\x07b\n", 2, ("not valid YAML",)),
    "not UTF-8": Broken(b"name: docs\nstorage: caf\xe9\n", 2, ("not UTF-8", "save the file as UTF-8")),
    "too large": Broken(TRAIN + "# " + "x" * MAX_JOB_FILE_BYTES, None, ("holds at most", str(MAX_JOB_FILE_BYTES))),
    "nested too deeply": Broken("name: docs\nmodel: " + "[" * 5000, 2, (f"more than {MAX_DEPTH} levels deep",)),
    # Readable, but with YAML that job files do not allow.
    "duplicate key": Broken(TRAIN + "  max_steps: 5\n  max_steps: 9\n", 6, ("train.max_steps", "twice", "line 5", "keep one")),
    "duplicate section": Broken(TRAIN + "model: {base: other}\n", 5, ("model is given twice", "first on line 2")),
    "alias": Broken(
        HEAD + "train:\n  data: [{path: &p a.jsonl}]\nstorage: *p\n", 5, ("storage", "alias *p", "write the value out")
    ),
    "alias in a list": Broken(HEAD + "train:\n  data:\n  - &s {path: a}\n  - *s\n", 6, ("train.data.1", "alias *s")),
    "alias bomb": Broken("a: &a [x, x]\nb: &b [*a, *a]\nname: [*b, *b]\n", 2, ("alias *a",)),
    "python tag on a value": Broken(
        TRAIN + "storage: !!python/name:os.system x\n", 5, ("storage", "YAML tag", "python/name:os.system", "plain value")
    ),
    "python tag on a list": Broken(TRAIN + "storage: !!python/object/apply:os.system [id]\n", 5, ("storage", "YAML tag")),
    "own tag on a section": Broken("name: docs\nmodel: !mine {base: x}\nserve: {}\n", 2, ("model has the YAML tag !mine",)),
    "list as key": Broken(TRAIN + "? [a, b]\n: 1\n", 5, ("key that is not plain text",)),
    "empty section": Broken(HEAD + "train:\nstorage: runs\n", 3, ("train is empty", "null says: none on purpose")),
    "empty value": Broken(TRAIN + "  max_steps:\n  chunk_size: 4\n", 5, ("train.max_steps is empty",)),
    "merge key": Broken(EMBED + "  <<: {rows_per_unit: 5}\n", 5, ("embed.<<", "not a known key")),
    # Wrong sections and keys.
    "no name": Broken("model: {base: x}\ntrain: {data: [{path: a}]}\n", 1, ("name is missing",)),
    "no model": Broken("name: docs\ntrain: {data: [{path: a}]}\n", 1, ("model is missing",)),
    "no stage": Broken(HEAD, 1, ("train is missing", "nothing to run")),
    "no data": Broken(HEAD + "train:\n  max_steps: 5\n", 3, ("train.data is missing", "Where training rows come from")),
    "unknown key, nearest shown": Broken(
        TRAIN + "  learning_rat: 1e-4\n", 5, ("train.learning_rat", "did you mean learning_rate?")
    ),
    "unknown key in a list item": Broken(
        HEAD + "train:\n  data:\n  - path: a\n  - path: b\n    wieght: 2\n", 7, ("train.data.1.wieght", "did you mean weight?")
    ),
    "unknown section": Broken(TRAIN + "trian: {}\n", 5, ("trian", "did you mean train?")),
    "key of another section": Broken(TRAIN + "zero_stage: 3\n", 5, ("zero_stage is not a known key", "known here: name")),
    "key of a sibling section": Broken(TRAIN + "pooling: mean\n", 5, ("pooling is not a known key", "model.pooling is one")),
    # Wrong values.
    "text for a number": Broken(TRAIN + '  max_steps: "5"\n', 5, ("train.max_steps = '5'", "valid integer", "Optimizer steps")),
    "fraction for a count": Broken(TRAIN + "  max_steps: 1.5\n", 5, ("train.max_steps = 1.5", "integer")),
    "number for text": Broken("name: 5\nmodel: {base: x}\nserve: {}\n", 1, ("name = 5", "valid string")),
    "true for a number": Broken(TRAIN + "  chunk_size: true\n", 5, ("train.chunk_size = true", "integer")),
    "yes for true": Broken(SERVE + "  keep_running: yes\n", 4, ("serve.keep_running = 'yes'", "valid boolean")),
    "null for a number": Broken(TRAIN + "  max_steps: null\n", 5, ("train.max_steps = null",)),
    "negative": Broken(TRAIN + "  learning_rate: -1e-4\n", 5, ("train.learning_rate = -0.0001", "greater than 0")),
    "zero workers": Broken(TRAIN + "  workers: {num_workers: 0}\n", 5, ("train.workers.num_workers = 0", "greater than 0")),
    "more ranks at least than at most": Broken(
        TRAIN + "  workers: {num_workers: 2, min_workers: 4}\n",
        5,
        ("train.workers.min_workers = 4", "more than num_workers = 2"),
    ),
    "not a number": Broken(TRAIN + "  weight_decay: .nan\n", 5, ("train.weight_decay = nan", "finite number")),
    "infinite": Broken(TRAIN + "  learning_rate: .inf\n", 5, ("train.learning_rate = inf", "finite number")),
    "overflowing float": Broken(TRAIN + "  learning_rate: 1e999\n", 5, ("train.learning_rate = inf", "finite number")),
    "huge int": Broken(TRAIN + f"  learning_rate: {'9' * 400}\n", 5, ("train.learning_rate = 999", "valid number")),
    "int of 5000 digits": Broken(TRAIN + f"  max_steps: {'9' * 5000}\n", 5, ("train.max_steps = 999", "not readable")),
    "int beyond 64 bits": Broken(
        "name: docs\nmodel: {base: x}\nserve: {}\nseed: 99999999999999999999\n", 4, ("seed", "less than")
    ),
    "too high": Broken(SERVE + "  port: 99999\n", 4, ("serve.port = 99999", "65535")),
    "mistyped choice": Broken(
        "name: docs\nmodel: {base: x, pooling: maen}\nserve: {}\n", 2, ("'lasttoken'", "did you mean mean?")
    ),
    "wrong choice": Broken(TRAIN + "  deepspeed: {zero_stage: 4}\n", 5, ("train.deepspeed.zero_stage = 4", "0, 1, 2 or 3")),
    "mistyped preset": Broken(TRAIN + "  objective: gril\n", 5, ("train.objective.preset = 'gril'", "did you mean grl?")),
    "number for an objective": Broken(TRAIN + "  objective: 5\n", 5, ("train.objective = 5", "mapping with keys preset")),
    "text for a section": Broken(HEAD + "train: grl\n", 3, ("train = 'grl'", "must be a mapping with keys objective")),
    "list for a section": Broken(
        TRAIN + "  workers: [2]\n", 5, ("train.workers = a list of 1", "mapping with keys num_workers")
    ),
    "text for a list": Broken(HEAD + "train:\n  data: pairs.jsonl\n", 4, ("train.data = 'pairs.jsonl'", "must be a list")),
    "mapping for a list": Broken(HEAD + "train:\n  data: {path: a}\n", 4, ("train.data = a mapping of 1", "must be a list")),
    "text for a list item": Broken(
        HEAD + "train:\n  data:\n  - path: a\n  - b.jsonl\n", 6, ("train.data.1 = 'b.jsonl'", "keys path")
    ),
    "empty list": Broken(HEAD + "train: {data: []}\n", 3, ("train.data is an empty list",)),
    "empty text": Broken('name: docs\nmodel: {base: ""}\nserve: {}\n', 2, ("model.base is an empty text",)),
    "number in a list of columns": Broken(
        HEAD + "embed:\n  input:\n    path: a\n    text:\n    - title\n    - 5\n", 8, ("embed.input.text.1 = 5", "valid string")
    ),
    "name in capitals": Broken("name: Docs Search\nmodel: {base: x}\nserve: {}\n", 1, ("'Docs Search'", "lower-case letters")),
    "name that leaves the folder": Broken("name: ../x\nmodel: {base: x}\nserve: {}\n", 1, ("name = '../x' is not allowed",)),
    # Secrets written out.
    "secret as a value": Broken(
        SERVE + "  api_keys: sk-live-0815\n", 4, ("serve.api_keys is a secret", "env:NAME or file:PATH"), "sk-live-0815"
    ),
    "secret as a number": Broken(
        "name: docs\nmodel: {base: x, hub_token: 12345678}\nserve: {}\n", 2, ("a secret",), "12345678"
    ),
    "secret with a tag": Broken(
        SERVE + "  api_keys: !!int sk-live-0815\n", 4, ("serve.api_keys is not readable",), "sk-live-0815"
    ),
    "secret in a list": Broken(SERVE + "  api_keys: [sk-live-0815]\n", 4, ("serve.api_keys is a secret",), "sk-live-0815"),
    "secret in a misplaced section": Broken(HEAD + "serve: [{api_keys: sk-live-0815}]\n", 3, ("a list of 1",), "sk-live-0815"),
    "secret under a mistyped key": Broken(SERVE + "  api_key: sk-live-0815\n", 4, ("did you mean api_keys?",), "sk-live-0815"),
    # Values that cannot stand together.
    "chunks that never end": Broken(
        HEAD + "embed:\n  input:\n    path: a\n    chunks: {tokens: 32, overlap: 32}\n",
        6,
        ("embed.input.chunks.overlap = 32", "repeats all 32 tokens", "use 31 or fewer"),
    ),
    "chunks longer than a text": Broken(
        HEAD + "embed:\n  input:\n    path: a\n    chunks: {tokens: 513}\n",
        6,
        ("embed.input.chunks.tokens = 513", "more than model.max_tokens = 512"),
    ),
    "batch over ranks": Broken(
        TRAIN + "  global_batch_size: 500\n  workers: {num_workers: 16}\n",
        5,
        ("500 does not divide over 16 ranks", "496 or 512", "train.workers.num_workers"),
    ),
    "batch smaller than ranks": Broken(
        TRAIN + "  workers: {num_workers: 16}\n  global_batch_size: 8\n", 6, ("8 does not divide over 16 ranks", "use 16,")
    ),
    "nothing to learn": Broken(
        TRAIN + "  objective:\n    preset: cl\n    contrastive_weight: 0\n", 5, ("train.objective", "has all weights 0")
    ),
    "DPO without negatives": Broken(
        TRAIN + "  objective: dpo\n  negatives_per_query: 0\n", 6, ("train.negatives_per_query = 0", "objective dpo")
    ),
    "distillation without negatives": Broken(
        TRAIN + "  objective: {preset: cl, distill_weight: 1}\n  negatives_per_query: 0\n",
        6,
        ("train.negatives_per_query = 0",),
    ),
    "an evaluation of nothing": Broken(HEAD + "evaluate: {bm25: true}\n", 3, ("measures nothing; add local",)),
    "queries over a table that the job does not make": Broken(
        HEAD + "evaluate:\n  local: [{path: a, table: true}]\n",
        4,
        ("searches the embeddings table of this job; add an embed section",),
    ),
    "a model without a name": Broken(HEAD + "evaluate:\n  local: [{path: a}]\n  models: [{}]\n", 5, ("names no model",)),
    "a task folder without its type": Broken(
        HEAD + "evaluate:\n  mteb: [{folder: tasks/faq}]\n", 4, ("a folder needs its task's type",)
    ),
    "a task folder with a name": Broken(
        HEAD + "evaluate:\n  mteb: [{folder: a, type: sts, name: STS12}]\n",
        4,
        ("is one task by itself; remove name and types",),
    ),
    "a task without anything": Broken(HEAD + "evaluate:\n  mteb: [{}]\n", 4, ("names no task",)),
    "an index nobody makes": Broken(
        SERVE.replace("serve:", "serve: {}") + "search: {index: hnsw}\n", 4, ("exact", "bits", "faiss")
    ),
    "a margin that leaves the miner nothing": Broken(
        TRAIN + "  objective: {preset: genc, negative_margin: 0.2}\n",
        5,
        ("drops every negative that miner_epsilon = 0.2 keeps",),
    ),
    "Matryoshka weights for other dims": Broken(
        TRAIN + "  objective: {preset: cl, matryoshka: {dims: [64, 32], weights: [1.0]}}\n", 5, ("are 1 for 2 dims",)
    ),
    "an adapter with nothing to do": Broken(
        "name: docs\nmodel: {base: m, lora: {adapters: separate}}\ntrain:\n  data: [{path: p}]\n  objective: cl\n",
        2,
        ("= separate has an adapter",),
    ),
    "4 bits without a GPU": Broken(
        "name: docs\nmodel: {base: m, lora: {quantize_base: nf4}}\ntrain: {data: [{path: p}]}\n", 2, ("runs on a GPU only",)
    ),
    "memory of a GPU that is not used": Broken(
        TRAIN + "  workers: {gpu_memory_gb: 80}\n", 5, ("= 80 is of GPUs that this job does not use; set gpus_per_worker: 1",)
    ),
    "4 bits sharded": Broken(
        "name: docs\nmodel: {base: m, lora: {quantize_base: nf4}}\n"
        "train: {data: [{path: p}], workers: {gpus_per_worker: 1}, deepspeed: {zero_stage: 3}}\n",
        2,
        ("= nf4 weights cannot be sharded",),
    ),
    "optimizer offloaded from no shard": Broken(
        TRAIN + "  deepspeed: {zero_stage: 0, offload_optimizer: true}\n", 5, ("use zero_stage 1, 2 or 3",)
    ),
    "parameters offloaded from no shard": Broken(
        TRAIN + "  deepspeed: {zero_stage: 2, offload_parameters: true}\n", 5, ("use zero_stage 3",)
    ),
    "adapter_off without LoRA": Broken(
        TRAIN + "  objective: {preset: dpo, reference: adapter_off}\n", 5, ("= adapter_off needs model.lora",)
    ),
    "generation much longer than the model": Broken(
        TRAIN + "  max_generation_tokens: 9000\n", 5, ("9000 is more than 4 x model.max_tokens = 512",)
    ),
    "actors min above max": Broken(
        EMBED + "  actors:\n    max: 2\n    min: 3\n", 7, ("embed.actors.min = 3 is more than max = 2",)
    ),
    "mantissas of bytes": Broken(
        EMBED + "  output:\n    dtype: int8\n    mantissa_bits: 10\n",
        7,
        ("embed.output.mantissa_bits = 10 rounds float32 numbers, and dtype is int8", "dtype: float32"),
    ),
    "bits that fill no whole byte": Broken(
        EMBED + "  output: {dtype: ubinary, dims: 100}\n", 5, ("embed.output.dims = 100", "use 96 or 104")
    ),
    "more dims than the vectors have": Broken(
        "name: docs\nmodel: {base: scratch, scratch: {hidden_size: 64}}\ntrain: {data: [{path: a}]}\n"
        "embed:\n  input: {path: b}\n  output: {dims: 128}\n",
        6,
        ("embed.output.dims = 128, but the vectors have model.scratch.hidden_size = 64 numbers",),
    ),
    "replicas min above max": Broken(SERVE + "  replicas: {min: 4}\n", 4, ("serve.replicas.min = 4 is more than max = 1",)),
    "two models of one name": Broken(
        SERVE + "  models:\n    - {name: a, base: x}\n  adapters:\n    - {name: a, path: x}\n",
        7,
        ("serve.adapters.0.name = a is taken",),
    ),
    "a model from two places": Broken(
        SERVE + "  models:\n    - {name: a, base: x, run: y}\n", 5, ("serve.models.0 has both run and base",)
    ),
    "a model from nowhere": Broken(SERVE + "  models:\n    - {name: a}\n", 5, ("serve.models.0 has neither run nor base",)),
    "a model's replicas": Broken(
        SERVE + "  models:\n    - {name: a, base: x, replicas: {min: 3}}\n",
        5,
        ("serve.models.0.replicas.min = 3 is more than",),
    ),
    "unknown scheme": Broken(
        HEAD + "train:\n  data: [{path: gs://b/x}]\n", 4, ("gs://b/x", "unknown scheme gs://", "s3://bucket")
    ),
    "no bucket": Broken(SERVE + "  port: 1\nstorage: s3://\n", 5, ("storage = s3:// names no bucket",)),
    "run: as storage": Broken(SERVE + "  port: 1\nstorage: run:x\n", 5, ("storage = run:x", "cannot be one itself")),
    "run: path that climbs out": Broken(
        HEAD + "embed:\n  input: {path: a}\n  output: {path: run:../../x}\n", 5, ("leaves the run's folder",)
    ),
    "built-in data not asked for": Broken(
        HEAD + "train:\n  data: [{path: run:data/train.jsonl}]\n", 4, ("written by the dataset section", "name: aws_api_docs")
    ),
    "shape of a pooling not used": Broken(
        "name: docs\nmodel:\n  base: a\n  latent_attention: {latents: 8}\nserve: {}\n",
        4,
        ("model.latent_attention", "model.pooling = mean", "set model.pooling: latent_attention"),
    ),
    "heads of latent attention": Broken(
        "name: docs\nmodel:\n  base: scratch\n  pooling: latent_attention\n  latent_attention: {heads: 7}\n"
        "  scratch: {hidden_size: 64}\ntrain: {data: [{path: a}]}\n",
        5,
        ("model.latent_attention.heads = 7 does not divide hidden_size 64",),
    ),
    "scratch with LoRA": Broken(
        "name: docs\nmodel: {base: scratch, lora: {rank: 4}}\ntrain: {data: [{path: a}]}\n",
        2,
        ("model.lora", "remove model.lora"),
    ),
    "scratch never trained": Broken(
        "name: docs\nmodel: {base: scratch}\nserve: {}\n", 2, ("model.base = scratch", "train section")
    ),
    "heads that do not divide": Broken(
        "name: docs\nmodel:\n  base: scratch\n  scratch:\n    hidden_size: 100\n    heads: 7\ntrain: {data: [{path: a}]}\n",
        6,
        ("model.scratch.heads = 7 does not divide hidden_size 100", "5 or 10"),
    ),
    "heads of odd width": Broken(
        "name: docs\nmodel: {base: scratch, scratch: {hidden_size: 12, heads: 4}}\ntrain: {data: [{path: a}]}\n",
        2,
        ("odd width 3",),
    ),
    "questions without a server": Broken(
        EMBED + "search:\n  questions: [why]\n", 6, ("search.questions", "add embed and serve")
    ),
}


@pytest.fixture
def cli() -> CliRunner:
    return CliRunner()


def test_the_table_is_as_long_as_promised() -> None:
    assert len(BROKEN) >= 35


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_broken_file_is_explained_and_exits_with_2(broken: Broken, tmp_path: Path, cli: CliRunner) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(broken.content if isinstance(broken.content, bytes) else broken.content.encode())

    with pytest.raises(JobFileError) as caught:
        load_job(path)
    found = [problem for problem in caught.value.problems if problem.line == broken.line]
    matching = [str(problem) for problem in found if all(word in str(problem) for word in broken.words)]
    assert matching, f"no problem on line {broken.line} says {broken.words}:\n{caught.value}"

    result = cli.invoke(app, ["check", str(path)])
    assert result.exit_code == 2
    assert matching[0] in result.stderr
    assert "Traceback" not in result.output
    assert broken.never not in result.output


@pytest.mark.parametrize(
    "broken", [b for name, b in BROKEN.items() if name != "alias bomb"], ids=[n for n in BROKEN if n != "alias bomb"]
)
def test_one_mistake_is_one_problem(broken: Broken, tmp_path: Path) -> None:
    """A mistake must not drag others behind it."""
    path = tmp_path / "job.yaml"
    path.write_bytes(broken.content if isinstance(broken.content, bytes) else broken.content.encode())
    with pytest.raises(JobFileError) as caught:
        load_job(path)
    assert len(caught.value.problems) == 1, str(caught.value)


def test_missing_file(tmp_path: Path, cli: CliRunner) -> None:
    result = cli.invoke(app, ["check", str(tmp_path / "none.yaml")])
    assert result.exit_code == 2
    assert "cannot be read (No such file or directory)" in result.stderr
    assert "ullme-ray init" in result.stderr


def test_folder_instead_of_file(tmp_path: Path, cli: CliRunner) -> None:
    result = cli.invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 2
    assert "Is a directory" in result.stderr


def test_a_good_file_passes(tmp_path: Path, cli: CliRunner) -> None:
    """The control: what the table breaks is good when it is not broken."""
    path = tmp_path / "job.yaml"
    for content in (TRAIN, EMBED, SERVE + "  port: 1\n"):
        path.write_text(content)
        assert cli.invoke(app, ["check", str(path)]).exit_code == 0
