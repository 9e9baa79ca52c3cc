"""Real retrieval data that every installation has: the AWS API documentation inside botocore (Apache-2.0), no network needed.

botocore is there because s3fs needs it. Reading takes about 3 s and gives about 6,700 pairs from about 400 services.

How a pair is made from one operation of the newest API version of a service:
1. The documentation's HTML becomes paragraphs of plain text. Those inside note, important and similar boxes are kept,
   but never give the query: many operations open with the same box.
2. The query is the service's full name, `: `, and the first sentence of the first paragraph outside a box.
   The passage is the rest of that paragraph and all other paragraphs, in order, one a line.
3. An operation is left out when the passage has less than MIN_PASSAGE_CHARS characters; when the passage holds the query's
   sentence (the answer would give itself away); when another operation of the same service has the same sentence or the
   same passage (boilerplate such as "This is AWS WAF Classic documentation"); or when tags remain (HTML escaped twice).
4. Passages of equal text (in two services) are one document with one id, and always lie on the same side of the split.

Everything drawn is drawn by `job.seed`: the same seed and botocore give the same bytes.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from ullme_ray import storage
from ullme_ray.errors import DataError
from ullme_ray.spec import JobSpec, RunFolder
from ullme_ray.spec.job import DatasetSpec

RULES_VERSION = 2  # raise it when the rules above change, so that old folders are written again
MIN_PASSAGE_CHARS = 120
MANIFEST = "dataset.json"

_BOXES = {"note", "important", "caution", "tip", "warning"}
_INLINE = {"a", "abbr", "b", "code", "em", "i", "link", "span", "strong", "sub", "sup", "u"}
# A sentence ends at . ! or ? before white space that no lower-case letter follows, abbreviations aside.
_SENTENCE = re.compile(r".+?(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)[.!?](?=\s+[^a-z]|$)")


@dataclass(frozen=True)
class Pair:
    """A query and the one passage that answers it."""

    service: str  # botocore's folder, such as s3
    service_name: str  # such as Amazon Simple Storage Service
    operation: str
    sentence: str
    passage: str

    @property
    def key(self) -> str:
        return f"{self.service}.{self.operation}"

    @property
    def query(self) -> str:
        return f"{self.service_name}: {self.sentence}"


def ensure_dataset(job: JobSpec) -> None:
    """Writes the data of `job.dataset` below run:data, if it is not there yet.

    Files: `train.jsonl` for training, `heldout/` in BEIR layout for evaluation (its corpus holds the passages of both splits),
    `heldout_pairs.jsonl` with the same queries as training rows are, for the generation checks, `corpus.jsonl` for embedding
    (the same ids, with a title to show), and `dataset.json`, written last.

    Raises:
        DataError: the section asks for more than botocore has.
    """
    if job.dataset is None:
        return
    folder = RunFolder.of(job).data
    wanted = {
        "section": job.dataset.model_dump(mode="json"),
        "seed": job.seed,
        "botocore": importlib.metadata.version("botocore"),
        "rules_version": RULES_VERSION,
    }
    manifest_path = storage.join(folder, MANIFEST)
    if _is_written(manifest_path, wanted):
        return
    files, counts = build_files(read_api_docs(), job.dataset, job.seed)
    storage.remove(manifest_path)  # a crash from here on leaves no manifest over mixed files
    for name, content in files.items():
        storage.write_text(storage.join(folder, name), content)
    storage.write_text(manifest_path, json.dumps({**wanted, "counts": counts}, indent=2) + "\n")


def _is_written(manifest_path: str, wanted: dict[str, Any]) -> bool:
    try:
        found = json.loads(storage.read_text(manifest_path))
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(found, dict) and {key: found.get(key) for key in wanted} == wanted


def read_api_docs(folder: str | Path | None = None) -> list[Pair]:
    """All usable pairs, sorted by service and operation (rules 1 to 3 above).

    Args:
        folder: a folder laid out like botocore's `data`; None takes the installed one.
    """
    root = Path(folder) if folder else _botocore_data()
    pairs: list[Pair] = []
    for service in sorted(entry.name for entry in root.iterdir() if entry.is_dir()):
        models = sorted((root / service).glob("*/service-2.json.gz"))  # folders are dates: the last is the newest
        if models:
            pairs += _service_pairs(service, json.loads(gzip.decompress(models[-1].read_bytes())))
    if not pairs:
        raise DataError(f"{root} holds no API documentation (*/*/service-2.json.gz); install botocore from PyPI again")
    return pairs


def _botocore_data() -> Path:
    spec = importlib.util.find_spec("botocore")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "dataset.name = aws_api_docs reads botocore's files, but botocore is not installed; pip install botocore"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _service_pairs(service: str, model: dict[str, Any]) -> list[Pair]:
    service_name = model["metadata"]["serviceFullName"]
    pairs = []
    for operation, details in sorted(model["operations"].items()):
        sentence, passage = split_documentation(details.get("documentation", ""))
        leaks = sentence in passage
        if sentence and len(passage) >= MIN_PASSAGE_CHARS and not leaks and "</p>" not in passage:
            pairs.append(Pair(service, service_name, operation, sentence, passage))
    sentences, passages = Counter(p.sentence for p in pairs), Counter(p.passage for p in pairs)
    return [p for p in pairs if sentences[p.sentence] == 1 and passages[p.passage] == 1]


def split_documentation(html: str) -> tuple[str, str]:
    """The first sentence and the rest of an operation's documentation, as plain text (rules 1 and 2 above)."""
    parser = _Paragraphs()
    parser.feed(html)
    parser.close()
    parser.end_paragraph()
    opening = next((i for i, paragraph in enumerate(parser.paragraphs) if not paragraph.boxed), None)
    if opening is None:
        return "", "\n".join(paragraph.text for paragraph in parser.paragraphs)
    text = parser.paragraphs[opening].text
    match = _SENTENCE.match(text)
    sentence = match.group() if match else text
    rest = [p.text if i != opening else text[len(sentence) :].strip() for i, p in enumerate(parser.paragraphs)]
    return sentence, "\n".join(part for part in rest if part)


@dataclass(frozen=True)
class _Paragraph:
    text: str
    boxed: bool


class _Paragraphs(HTMLParser):
    """Collects paragraphs of plain text; every tag that is not inline ends one."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[_Paragraph] = []
        self._pieces: list[str] = []
        self._open_boxes = 0

    def end_paragraph(self) -> None:
        text = " ".join("".join(self._pieces).split())
        self._pieces.clear()
        if text:
            self.paragraphs.append(_Paragraph(text, self._open_boxes > 0))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE:
            self.end_paragraph()
        self._open_boxes += tag in _BOXES

    def handle_endtag(self, tag: str) -> None:
        if tag not in _INLINE:
            self.end_paragraph()
        if tag in _BOXES:
            self._open_boxes = max(0, self._open_boxes - 1)

    def handle_data(self, data: str) -> None:
        self._pieces.append(data)


def build_files(pairs: Sequence[Pair], section: DatasetSpec, seed: int) -> tuple[dict[str, str], dict[str, int]]:
    """The data set's files (name -> content) and the number of rows of each kind."""
    if section.max_pairs is not None and section.max_pairs < len(pairs):
        pairs = sorted(random.Random(f"{seed}/pairs").sample(pairs, section.max_pairs), key=lambda p: p.key)
    train, heldout = _split(pairs, section.heldout_queries, seed)
    documents: dict[str, Pair] = {}  # passage text -> the first operation that has it
    for pair in pairs:
        documents.setdefault(pair.passage, pair)
    files = {
        "train.jsonl": _jsonl(_rows(train, train, section.negatives_per_query, seed)),
        "heldout_pairs.jsonl": _jsonl(_rows(heldout, pairs, section.negatives_per_query, seed)),
        # Training sees bare passages, so evaluation must: the BEIR title stays empty.
        "heldout/corpus.jsonl": _jsonl(
            {"_id": d.key, "title": "", "text": d.passage, **_origin(d)} for d in documents.values()
        ),
        "heldout/queries.jsonl": _jsonl({"_id": f"q-{p.key}", "text": p.query} for p in heldout),
        "heldout/qrels/test.tsv": "query-id\tcorpus-id\tscore\n"
        + "".join(f"q-{p.key}\t{documents[p.passage].key}\t1\n" for p in heldout),
        "corpus.jsonl": _jsonl(
            {"id": d.key, "title": f"{d.service_name} {d.operation}", "text": d.passage, **_origin(d)}
            for d in documents.values()
        ),
    }
    return files, {"train": len(train), "heldout": len(heldout), "corpus": len(documents)}


def _split(pairs: Sequence[Pair], heldout_queries: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs; neither a held-out query nor its passage is trained on as a positive."""
    linked: dict[str, list[Pair]] = defaultdict(list)  # passage -> pairs that must stay together
    for pair in pairs:
        linked[pair.passage].append(pair)
    groups = list(linked.values())
    random.Random(f"{seed}/heldout").shuffle(groups)
    heldout: list[Pair] = []
    for group in groups:
        if len(heldout) + len(group) <= heldout_queries:
            heldout += group
    queries = {pair.query for pair in heldout}
    train = [pair for pair in pairs if pair.query not in queries]
    if len(heldout) < heldout_queries or len(train) < 2:
        raise DataError(
            f"dataset.heldout_queries = {heldout_queries} of {len(pairs)} pairs leaves no two pairs for training; "
            "lower it, or raise dataset.max_pairs"
        )
    return train, sorted(heldout, key=lambda p: p.key)


def _rows(chosen: Sequence[Pair], pool: Sequence[Pair], negatives_per_query: int, seed: int) -> Iterable[dict[str, Any]]:
    """The chosen pairs with hard negatives: passages of other operations of the same service, of the pool only."""
    by_service: dict[str, list[Pair]] = defaultdict(list)
    for pair in pool:
        by_service[pair.service].append(pair)
    for pair in chosen:
        others = [other.passage for other in by_service[pair.service] if other.passage != pair.passage]
        count = min(negatives_per_query, len(others))
        negatives = random.Random(f"{seed}/negatives/{pair.key}").sample(others, count)
        yield {"query": pair.query, "positive": pair.passage, "negatives": negatives, **_origin(pair)}


def _origin(pair: Pair) -> dict[str, str]:
    return {"service": pair.service, "operation": pair.operation}


def _jsonl(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
