"""Chunks of long documents: no token is lost, the overlap is as asked, and a short document is tokenized as without chunks."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tiny_encoders import save_encoder

from ullme_ray.errors import ModelError
from ullme_ray.model.tokenizing import TextTokenizer, load_tokenizer

TEXTS = ["list", "", "makes a bucket private; " * 40, "ü漢 </s> <s> 🙂" * 9, "x" * 300]
PROMPTS = ["", "Text:\n", "query: "]  # the last one's space merges with the text's first letters


@pytest.fixture(scope="module")
def framed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose tokenizer puts a token before a text and one behind it; that of tiny_base has only the first."""
    return save_encoder("xlm-roberta", str(tmp_path_factory.mktemp("framed")))


def open_tokenizer(folder: str | Path, prompt: str, max_tokens: int = 64) -> TextTokenizer:
    return TextTokenizer(load_tokenizer(str(folder)), max_tokens=max_tokens, query_prompt="", passage_prompt=prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("has_closing_token", [False, True])
@pytest.mark.parametrize(("size", "overlap"), [(1, 0), (7, 3), (16, 15), (40, 8)])
def test_windows_hold_every_token_of_a_document_in_order(
    tiny_base: str, framed: str, prompt: str, has_closing_token: bool, size: int, overlap: int
) -> None:
    tokenizer = open_tokenizer(framed if has_closing_token else tiny_base, prompt)
    whole = open_tokenizer(framed if has_closing_token else tiny_base, prompt, max_tokens=100_000).tokenize(TEXTS, "passage")
    chunks, documents = tokenizer.tokenize_chunks(TEXTS, "passage", chunk_tokens=size, overlap=overlap)
    assert len(documents) == len(chunks.input_ids) == len(chunks.truncated)
    assert not any(chunks.truncated)
    assert chunks.prompt_length == whole.prompt_length
    assert documents.tolist() == sorted(documents.tolist())
    tail = 1 if has_closing_token else 0
    head = chunks.prompt_length or 1  # the prompt's length has the opening token in it
    seen_many = False
    for number, ids in enumerate(whole.input_ids):
        own = [chunk for chunk, document in zip(chunks.input_ids, documents) if document == number]
        assert own[0][:head] == ids[:head]
        for chunk in own:
            assert chunk[len(chunk) - tail :] == ids[len(ids) - tail :]
            assert len(chunk) - head - tail <= size
        bodies = [chunk[head : len(chunk) - tail] for chunk in own]
        rebuilt = bodies[0]
        for before, body in itertools.pairwise(bodies):
            assert len(before) == size  # only the last is short
            assert body[:overlap] == before[size - overlap :]
            assert len(body) > overlap  # else it would say nothing new
            rebuilt = rebuilt + body[overlap:]
        assert rebuilt == ids[head : len(ids) - tail]
        seen_many = seen_many or len(own) > 2
    assert seen_many


def test_a_document_of_one_chunk_is_tokenized_as_without_chunks(framed: str) -> None:
    tokenizer = open_tokenizer(framed, "Text:\n")
    plain = tokenizer.tokenize(TEXTS[:2], "passage")
    chunks, documents = tokenizer.tokenize_chunks(TEXTS[:2], "passage", chunk_tokens=30, overlap=4)
    assert (chunks, documents.tolist()) == (plain, [0, 1])
    long = tokenizer.tokenize(TEXTS[2:3], "passage")
    assert long.truncated == [True]  # the control: without chunks this text loses its end
    assert len(tokenizer.tokenize_chunks(TEXTS[2:3], "passage", chunk_tokens=30, overlap=4)[1]) > 1


def test_no_documents_make_no_chunks(tiny_base: str) -> None:
    chunks, documents = open_tokenizer(tiny_base, "").tokenize_chunks([], "passage", chunk_tokens=8, overlap=2)
    assert (chunks.input_ids, documents.tolist()) == ([], [])


def test_chunks_that_do_not_fit_the_model_are_refused_with_the_size_that_does(framed: str) -> None:
    tokenizer = open_tokenizer(framed, "Text:\n", max_tokens=32)
    frame = tokenizer.tokenize(["a"], "passage").prompt_length + 1
    fitting = 32 - frame
    tokenizer.check_chunks(fitting, "passage")
    with pytest.raises(ModelError, match=rf"chunks.tokens = {fitting + 1}, .*model.max_tokens = 32; use {fitting} or fewer"):
        tokenizer.check_chunks(fitting + 1, "passage")
    chunks, _ = tokenizer.tokenize_chunks(TEXTS, "passage", chunk_tokens=fitting, overlap=2)
    assert max(map(len, chunks.input_ids)) == 32
