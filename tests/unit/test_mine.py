"""Mining without Ray: an exact ranking, the filters of sentence-transformers, and no positive ever among the negatives."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ullme_ray.errors import DataError, JobFileError, ModelError
from ullme_ray.mine import preflight, texts
from ullme_ray.mine.corpus import Corpus, MiningTexts
from ullme_ray.mine.encoder import open_miner
from ullme_ray.mine.search import Marked, Ranking, choose_negatives, rank
from ullme_ray.mine.texts import TextStore
from ullme_ray.model import open_encoder
from ullme_ray.pairs import Pair, Source
from ullme_ray.spec.job import EncoderSpec, JobSpec, MineSpec
from ullme_ray.spec.load import parse_job

WORDS = [f"w{n}" for n in range(60)]


def sources(*pairs: Pair) -> list[Source]:
    return [Source("pairs.jsonl", 1.0, pairs)]


def random_pairs(count: int) -> list[Pair]:
    """Queries that share words with their positive; every fifth has a second positive, in a row of its own."""
    generator = np.random.default_rng(5)
    pairs = []
    for n in range(count):
        topic = generator.choice(WORDS, 4)
        query = " ".join([f"q{n}", *topic[:2]])
        for _ in range(2 if n % 5 == 0 else 1):
            words = [*topic, *generator.choice(WORDS, 6)]
            pairs.append(Pair(query, (" ".join(generator.permutation(words)),), ()))
    return pairs


def static_model() -> Any:
    """A real sentence-transformers model whose vectors are means of random word vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*WORDS, *(f"q{n}" for n in range(60)), "[UNK]"]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(1).normal(size=(len(names), 16)).astype(np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


def mine(found: MiningTexts, encode: Any, settings: MineSpec, *, seed: int = 13, tile: int = 17) -> dict[str, list[str]]:
    """query -> its negatives, through the parts that the Ray pipeline is made of."""
    queries = encode([found.queries[n] for n in range(len(found.queries))])
    passages = encode([found.passages[n] for n in range(len(found.passages))])
    marked = found.marked(0, len(queries))
    tiles = [(start, passages[start : start + tile]) for start in range(0, len(passages), tile)]
    ranking = rank(queries, tiles, marked, num_candidates=found.num_candidates, depth=settings.depth)
    numbers, _ = choose_negatives(ranking, marked, settings, seed=seed, first_query=0)
    return {found.queries[n]: [found.passages[int(p)] for p in row if p >= 0] for n, row in enumerate(numbers)}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"skip_first": 0}, {}),
        ({"skip_first": 5}, {"range_min": 5}),
        ({"skip_first": 5, "depth": 9}, {"range_min": 5, "range_max": 9}),
        ({"skip_first": 0, "margin": 0.1}, {"absolute_margin": 0.1}),
        ({"skip_first": 0, "ratio": 0.8}, {"relative_margin": 0.2}),
        ({"skip_first": 3, "margin": 0.05, "ratio": 0.9}, {"range_min": 3, "absolute_margin": 0.05, "relative_margin": 0.1}),
    ],
)
def test_same_negatives_as_sentence_transformers(tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    pairs, model = random_pairs(30), static_model()  # 36 passages: beyond their edge ours would not look as far as theirs
    data = Dataset.from_dict({"query": [p.query for p in pairs], "answer": [p.positives[0] for p in pairs]})
    theirs = {"range_max": 40} | theirs
    mined = mine_hard_negatives(data, model, num_negatives=4, output_format="labeled-list", verbose=False, **theirs)
    expected = {row["query"]: row["answer"][1:] for row in mined}
    found = MiningTexts(sources(*pairs), None, tmp_path)

    def encode(some: list[str]) -> np.ndarray:
        return model.encode(some, normalize_embeddings=True)

    settings = MineSpec.model_validate({"negatives_per_query": 4, "depth": 40, "choose": "top"} | ours)
    got = {query: negatives for query, negatives in mine(found, encode, settings).items() if negatives}
    assert len(expected) > 20
    assert got == expected
    other = settings.model_copy(update={"skip_first": settings.skip_first + 1})
    assert mine(found, encode, other) != got, "the control: one rank more passed over is another answer"


def vectors(rows: int, seed: int) -> np.ndarray:
    """Small whole numbers: inner products are exact and often equal."""
    return np.random.default_rng(seed).integers(-2, 3, size=(rows, 8)).astype(np.float32)


@pytest.mark.parametrize("tile", [1, 7, 64, 200])
@pytest.mark.parametrize("depth", [5, 300])
def test_rank_equals_a_full_sort(tile: int, depth: int) -> None:
    queries, passages, num_candidates = vectors(9, 1), vectors(200, 2), 150
    marked = Marked(np.array([0, 0, 4, 8]), np.array([3, 199, 140, 7]), np.array([True, True, True, False]))
    scores = queries @ passages.T
    expected_marked = scores[marked.rows, marked.passages].copy()
    scores[marked.rows, marked.passages] = -np.inf
    best = -np.sort(-scores[:, :num_candidates], axis=1)[:, :depth]
    tiles = [(start, passages[start : start + tile]) for start in range(0, len(passages), tile)]
    ranking = rank(queries, tiles, marked, num_candidates=num_candidates, depth=depth)
    np.testing.assert_array_equal(ranking.scores, best)
    np.testing.assert_array_equal(ranking.marked_scores, expected_marked)
    there = np.isfinite(ranking.scores)
    np.testing.assert_array_equal(ranking.scores[there], np.take_along_axis(scores, ranking.passages, axis=1)[there])
    assert ranking.passages[there].max() < num_candidates
    for row, numbers in enumerate(ranking.passages):
        kept = numbers[there[row]]
        assert len(set(kept)) == len(kept)
        assert not set(kept) & set(marked.passages[marked.rows == row])


def ranking_of(scores: list[float], positive: float) -> tuple[Ranking, Marked]:
    marked = Marked(np.array([0]), np.array([99]), np.array([True]))
    return Ranking(np.arange(len(scores))[None], np.array([scores], np.float32), np.array([positive], np.float32)), marked


@pytest.mark.parametrize(
    ("positive", "settings", "kept"),
    [
        (0.5, {}, [0, 1, 2, 3]),
        (0.5, {"margin": 0.0}, [2, 3]),  # a score equal to the positive's is not below it
        (0.5, {"margin": 0.25}, [3]),
        (0.5, {"ratio": 0.75}, [3]),
        (0.5, {"ratio": 1.0}, [2, 3]),
        (-0.25, {"ratio": 0.5}, [4]),  # half of a negative cosine would be above the positive
        (0.5, {"skip_first": 3}, [3]),
    ],
)
def test_margin_and_ratio(positive: float, settings: dict[str, Any], kept: list[int]) -> None:
    scores = [0.75, 0.5, 0.375, -0.25, -0.5] if positive < 0 else [0.75, 0.5, 0.375, -0.25]
    spec = MineSpec.model_validate({"skip_first": 0, "choose": "top"} | settings)
    numbers, found = choose_negatives(*ranking_of(scores, positive), spec, seed=1, first_query=0)
    assert [n for n in numbers[0] if n >= 0] == kept
    assert [score for n, score in zip(numbers[0], found[0]) if n >= 0] == [scores[n] for n in kept]


def test_the_worst_positive_sets_the_limit() -> None:
    marked = Marked(np.array([0, 0, 0]), np.array([7, 8, 9]), np.array([True, True, False]))
    ranking = Ranking(np.arange(3)[None], np.array([[0.7, 0.4, 0.1]], np.float32), np.array([0.8, 0.3, -1.0], np.float32))
    spec = MineSpec(skip_first=0, margin=0.0, choose="top")
    numbers, _ = choose_negatives(ranking, marked, spec, seed=1, first_query=0)
    assert numbers.tolist() == [[2, -1, -1, -1]]  # the unmarked limit -1.0 of the query's own text plays no part


def test_random_choice_is_seeded_and_from_the_window() -> None:
    scores = [1.0 - n / 100 for n in range(60)]
    ranking, marked = ranking_of(scores, 2.0)
    spec = MineSpec(skip_first=10, choose="random")

    def chosen(seed: int, query: int) -> list[int]:
        return choose_negatives(ranking, marked, spec, seed=seed, first_query=query)[0][0].tolist()

    assert chosen(1, 0) == chosen(1, 0)
    different = {tuple(chosen(seed, query)) for seed in (1, 2) for query in (0, 1)}
    assert len(different) == 4
    for numbers in different:
        assert list(numbers) == sorted(set(numbers))  # best first, none twice
        assert min(numbers) >= 10


def test_texts_keep_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "BLOCK_TEXTS", 3)
    store = TextStore(tmp_path / "texts.arrow")
    some = ["a", "b", "c", "ä\n", "", "f", "g"]
    assert [store.add(text) for text in [*some, "c", "a"]] == [0, 1, 2, 3, 4, 5, 6, 2, 0]
    store.close()
    assert (len(store), store.num_blocks) == (7, 3)
    assert [store[n] for n in range(7)] == [text for block in range(3) for text in store.block(block)] == some
    assert [store.number("f"), store.number("x")] == [5, None]


def test_positives_of_all_rows_and_the_query_itself_are_marked(tmp_path: Path) -> None:
    pairs = [
        Pair("same", ("one",), ("bad",)),
        Pair("other", ("two", "one"), ()),
        Pair("same", ("three", "one"), ("two",)),
        Pair("three", ("four",), ("same",)),
    ]
    found = MiningTexts(sources(*pairs), None, tmp_path)
    names = [found.passages[n] for n in range(len(found.passages))]
    assert sorted(names) == ["bad", "four", "one", "same", "three", "two"]
    assert found.num_candidates == 6

    def pairs_in(marked: Marked, positive: bool, first: int = 0) -> set[tuple[str, str]]:
        chosen = marked.is_positive == positive
        return {(found.queries[first + q], names[p]) for q, p in zip(marked.rows[chosen], marked.passages[chosen])}

    marked = found.marked(0, 3)
    positives = {(pair.query, positive) for pair in pairs for positive in pair.positives}
    assert pairs_in(marked, True) == positives
    assert pairs_in(marked, False) == {("same", "same"), ("three", "three")}
    assert pairs_in(found.marked(2, 1), True, 2) == {("three", "four")}
    numbers = [found.place(q, p) for q, p in zip(marked.rows[marked.is_positive], marked.passages[marked.is_positive])]
    assert numbers == list(range(len(positives)))


def test_a_corpus_gives_the_candidates_and_positives_only_their_scores(tmp_path: Path) -> None:
    found = MiningTexts(sources(Pair("q", ("p1", "c2"), ("n1",))), iter(["c1", "c2", "c1"]), tmp_path)
    assert [found.passages[n] for n in range(len(found.passages))] == ["c1", "c2", "p1"]
    assert found.num_candidates == 2


def write_lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_corpus_rows_without_text_are_counted(tmp_path: Path) -> None:
    rows = [
        {"title": "t", "body": "b"},
        {"title": "", "body": "only body"},
        {"title": None, "body": " "},
        {"title": 3, "body": "b"},
        "not json",
        ["list"],
        {"other": "x"},
        '{"title": "\\ud800"}',
    ]
    path = write_lines(tmp_path / "c.jsonl", rows)
    corpus = Corpus(path, ("title", "body"))
    assert list(corpus.passages()) == ["t\nb", "only body"]
    assert (corpus.num_rejected, corpus.first_rejected) == (6, f"{path} row 3")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(Path(path).read_bytes()))
    assert list(Corpus(f"{path}.gz", ("title", "body")).passages()) == ["t\nb", "only body"]
    (tmp_path / "c.jsonl.zst").write_bytes(pa.compress(Path(path).read_bytes(), codec="zstd", asbytes=True))
    assert list(Corpus(f"{path}.zst", ("title", "body")).passages()) == ["t\nb", "only body"]


def test_a_corpus_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    def refused(name: str, words: str) -> None:
        with pytest.raises(DataError, match=words):
            list(Corpus(str(tmp_path / name), ("text",)).passages())

    refused("none.jsonl", "matches no file")
    (tmp_path / "x.doc").write_text("x")
    refused("x.doc", r"is none of \.jsonl")
    (tmp_path / "empty.jsonl").touch()
    refused("empty.jsonl", "the files are empty")
    write_lines(tmp_path / "bad.jsonl", [{"body": "b"}] * 2)
    refused("bad.jsonl", r"none of 2 rows has text in text \(first: .*bad.jsonl row 1\)")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "bad.parquet")
    refused("bad.parquet", "none of 1 rows has text")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "x" * 1000}).encode())[:-9])
    refused("torn.jsonl.gz", "torn.jsonl.gz cannot be read: OSError: Truncated")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "bad.parquet").read_bytes()[:-9])
    refused("torn.parquet", "torn.parquet cannot be read")


JOB = "name: a\nmodel: {base: some/model}\n"
TRAIN = JOB + "train: {data: [{path: pairs.jsonl}]}\n"


@pytest.mark.parametrize(
    ("job", "where", "words"),
    [
        (JOB + "serve: {}\nmine: {}\n", "mine", "add a train section"),
        (TRAIN + "mine: {depth: 32}\n", "mine.depth", "leaves fewer than negatives_per_query = 4; use 34 or more"),
        (TRAIN + "mine: {output: mined.parquet}\n", "mine.output", "is not allowed"),
        (
            TRAIN + "mine: {encoder: {base: trained, pooling: cls}}\n",
            "mine.encoder.pooling",
            "for encoder trained",
        ),
        (TRAIN + "mine: {actors: {min: 3, max: 2}}\n", "mine.actors.min", "lower min or raise max"),
        (TRAIN + "mine: {corpus: {path: 'gs://b/c.jsonl'}}\n", "mine.corpus.path", "unknown scheme gs://"),
        (TRAIN + "mine: {corpus: c.jsonl}\n", "mine.corpus", "must be a mapping with keys path, text"),
        (TRAIN + "mine: {ratio: 1.5}\n", "mine.ratio", "less than or equal to 1"),
    ],
)
def test_what_a_job_may_not_ask_for(job: str, where: str, words: str) -> None:
    with pytest.raises(JobFileError) as raised:
        parse_job(job.encode())
    assert [(problem.where, words in problem.message) for problem in raised.value.problems] == [(where, True)]


def test_an_encoder_may_be_a_name_alone() -> None:
    cases: list[tuple[str, list[str]]] = [("mine: {encoder: some/e5}\n", []), ("mine: {}\n", ["mine.encoder=some/e5"])]
    for text, overrides in cases:
        job = parse_job((TRAIN + text).encode(), overrides=overrides)
        assert job.mine is not None
        assert job.mine.encoder == EncoderSpec(base="some/e5")
    assert job.stages == ("train",)  # `run` does not mine


def test_the_same_job_trains_on_what_it_mined() -> None:
    job = parse_job((TRAIN + "mine: {}\n").encode(), overrides=["train.data=[{path: run:mined/train.jsonl}]"])
    assert job.train is not None
    assert job.mine is not None
    assert job.train.data[0].path == job.mine.output


def mine_job(tmp_path: Path, base: str, **mine: Any) -> JobSpec:
    rows = [{"query": f"q{n}", "positive": f"p{n}"} for n in range(3)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    return JobSpec.model_validate(
        {
            "name": "mined",
            "storage": str(tmp_path / "runs"),
            "model": {"base": base, "max_tokens": 64, "prompts": {"query": "the query "}},
            "train": {"data": [{"path": path}]},
            "mine": mine,
        }
    )


def test_preflight_names_what_is_missing(tmp_path: Path, tiny_base: str) -> None:
    preflight(mine_job(tmp_path, tiny_base))
    preflight(mine_job(tmp_path, "no/such/folder", encoder=tiny_base))  # the job's own base plays no part
    with pytest.raises(ModelError, match=r"mine\.encoder = /no/such: .* is not a folder"):
        preflight(mine_job(tmp_path, tiny_base, encoder="/no/such"))
    with pytest.raises(ModelError, match=r"mine\.encoder = trained: .* holds no trained model yet"):
        preflight(mine_job(tmp_path, tiny_base, encoder="trained"))
    with pytest.raises(DataError, match=r"mine\.corpus\.path = .*none\.jsonl matches no file"):
        preflight(mine_job(tmp_path, tiny_base, corpus={"path": str(tmp_path / "none.jsonl")}))
    with pytest.raises(DataError, match=r"pairs\.jsonl is among the files that are read"):
        preflight(mine_job(tmp_path, tiny_base, output=str(tmp_path / "x" / ".." / "pairs.jsonl")))


def test_settings_of_the_encoder(tmp_path: Path, tiny_base: str) -> None:
    job = mine_job(tmp_path, tiny_base)
    text = ["the bucket policy makes a table private"]

    def encode(spec: EncoderSpec, prompt: Any) -> np.ndarray:
        return open_miner(job, spec, device="cpu").encode(text, prompt)

    own = open_encoder(job, which="base", device="cpu").encode(text, "query")
    np.testing.assert_array_equal(encode(EncoderSpec(base="base"), "query"), own)
    plain = encode(EncoderSpec(base=tiny_base), "query")
    assert not np.allclose(plain, own, atol=1e-4), "the job's prompt must not reach another model"
    same = EncoderSpec.model_validate({"base": tiny_base, "max_tokens": 64, "prompts": {"query": "the query "}})
    np.testing.assert_array_equal(encode(same, "query"), own)
    np.testing.assert_array_equal(encode(same, "passage"), encode(EncoderSpec(base=tiny_base), "passage"))
    assert not np.allclose(encode(EncoderSpec(base=tiny_base, pooling="lasttoken"), "query"), plain, atol=1e-4)


def test_a_sentence_transformers_folder_gives_its_own_vectors(tmp_path: Path, tiny_base: str) -> None:
    """An encoder as hubs have them, with prompts, a length and a pooling of its own, which the job need not know."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, pad_token_id=0
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(tmp_path / "bert")
    body = Transformer(str(tmp_path / "bert"), max_seq_length=16)
    theirs = SentenceTransformer(
        modules=[body, Pooling(32, pooling_mode="cls"), Normalize()],
        prompts={"query": "the query ", "document": "a table "},
        device="cpu",
    )
    theirs.save(str(tmp_path / "st"))
    ours = open_miner(mine_job(tmp_path, tiny_base), EncoderSpec(base=str(tmp_path / "st")), device="cpu")
    some = ["bucket policy", "the object key returns a value " * 5, "list"]
    np.testing.assert_allclose(ours.encode(some, "query"), theirs.encode_query(some), atol=1e-5)
    np.testing.assert_allclose(ours.encode(some, "passage"), theirs.encode_document(some), atol=1e-5)
    assert not np.allclose(ours.encode(some, "query"), ours.encode(some, "passage"), atol=1e-3), "the prompts should count"
