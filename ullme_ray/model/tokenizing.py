"""Text -> token ids, for both passes of the backbone. CPU only; a tokenizer is cheap to load and holds no weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ullme_ray.errors import ModelError

PromptName = Literal["query", "passage"]
_LEAST_GENERATION_ROOM = 4
_CALL_CHARACTERS = 2**20  # tokenized at a time: the library needs some 160 bytes for each until it is done


@dataclass(frozen=True)
class Tokens:
    """Texts of one prompt as token ids, prompt included; `prompt_length` leading ids belong to the prompt."""

    input_ids: list[list[int]]
    prompt_length: int
    truncated: list[bool]

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids in self.input_ids)


@dataclass(frozen=True)
class GenerationTokens:
    """One prompt and the passage that should follow it; only the last `passage_length` ids are scored."""

    input_ids: list[int]
    passage_length: int


class TextTokenizer:
    """The tokenizer of a model together with its prompts and its length limit.

    Prompt handling is that of sentence-transformers, so that an export gives the same ids there: prompt and text are one
    string, and the prompt's length is that of the prompt tokenized alone, less a closing special token.
    """

    def __init__(self, tokenizer: Any, *, max_tokens: int, query_prompt: str, passage_prompt: str) -> None:
        self.hf = tokenizer
        self.max_tokens = max_tokens
        self.prompts: dict[str, str] = {"query": query_prompt, "passage": passage_prompt}
        self._variants: dict[tuple[str, str], TextTokenizer] = {}
        self._prompt_ids = {name: self._ids_of_prompt(prompt) for name, prompt in self.prompts.items()}
        self._prompt_lengths = {name: len(ids) for name, ids in self._prompt_ids.items()}
        for name, length in self._prompt_lengths.items():
            if length >= max_tokens:
                raise ModelError(
                    f"model.prompts.{name} is {length} tokens long, which leaves no room for text within model.max_tokens = "
                    f"{max_tokens}; shorten the prompt or raise model.max_tokens"
                )

    def with_prompts(self, query: str, passage: str) -> TextTokenizer:
        """The same tokenizer with other prompts; made once for each pair of them."""
        if self.prompts == {"query": query, "passage": passage}:
            return self
        if (query, passage) not in self._variants:
            self._variants[query, passage] = TextTokenizer(
                self.hf, max_tokens=self.max_tokens, query_prompt=query, passage_prompt=passage
            )
        return self._variants[query, passage]

    @property
    def pad_id(self) -> int:
        """Filler for padding. Its value never matters: padding is masked everywhere."""
        for candidate in (self.hf.pad_token_id, self.hf.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0

    def tokenize(self, texts: Sequence[str], prompt: PromptName, *, keep: Literal["start", "end"] = "start") -> Tokens:
        """Ids of `prompt + text`, cut to `max_tokens`; `truncated` tells which texts lost something.

        Args:
            keep: which end of a long text stays; its prompt and special tokens always do.
        """
        if keep == "end":
            return self._tokenize_ends(texts, prompt)
        tokens = Tokens([], self._prompt_lengths[prompt], [])
        for encoding in self._encodings(texts, prompt, truncation=True, max_length=self.max_tokens):
            # A text that tokenizes to nothing (no special tokens, empty string) still needs one position to pool.
            tokens.input_ids.append(encoding.ids or [self.pad_id])
            tokens.truncated.append(bool(encoding.overflowing))
        return tokens

    def tokenize_chunks(
        self, texts: Sequence[str], prompt: PromptName, *, chunk_tokens: int, overlap: int
    ) -> tuple[Tokens, np.ndarray]:
        """Texts as windows of `chunk_tokens` of their own ids, each with prompt and special tokens; nothing is cut off.

        A window starts `chunk_tokens - overlap` ids after the one before it. A text of one window gets the ids of `tokenize`.

        Returns:
            All chunks, those of a text one after another in its order, and the number of the text of each: (chunks,) int32.

        Raises:
            ModelError: as `check_chunks`.
        """
        assert 0 <= overlap < chunk_tokens
        self.check_chunks(chunk_tokens, prompt)
        chunks = Tokens([], self._prompt_lengths[prompt], [])
        documents: list[int] = []
        for document, encoding in enumerate(self._encodings(texts, prompt, verbose=False)):
            windows = self._windows(encoding, prompt, chunk_tokens, overlap)
            chunks.input_ids.extend(windows)
            chunks.truncated.extend([False] * len(windows))
            documents.extend([document] * len(windows))
        return chunks, np.array(documents, np.int32)

    def check_chunks(self, chunk_tokens: int, prompt: PromptName) -> None:
        """Raises ModelError where a chunk, with prompt and special tokens, is longer than a text may be."""
        frame = len(self.hf(self.prompts[prompt])["input_ids"])
        if chunk_tokens + frame > self.max_tokens:
            raise ModelError(
                f"embed.input.chunks.tokens = {chunk_tokens}, with {frame} tokens of prompt and special tokens around them, is "
                f"more than model.max_tokens = {self.max_tokens}; use {max(self.max_tokens - frame, 0)} or fewer"
            )

    def _tokenize_ends(self, texts: Sequence[str], prompt: PromptName) -> Tokens:
        tokens = Tokens([], self._prompt_lengths[prompt], [])
        for encoding in self._encodings(texts, prompt, verbose=False):
            ids, excess = encoding.ids or [self.pad_id], len(encoding.ids) - self.max_tokens
            lead = next((at for at, special in enumerate(encoding.special_tokens_mask) if not special), 0)
            head = self._prompt_ids[prompt] or ids[:lead]
            tokens.input_ids.append(head + ids[len(head) + excess :] if excess > 0 else ids)
            tokens.truncated.append(excess > 0)
        return tokens

    def _windows(self, encoding: Any, prompt: PromptName, chunk_tokens: int, overlap: int) -> list[list[int]]:
        ids, added = encoding.ids, encoding.special_tokens_mask  # 1 for tokens put around the text, 0 for those written in it
        lead = next((at for at, special in enumerate(added) if not special), len(ids))
        start = max(self._prompt_lengths[prompt], lead)
        stop = len(ids) - next((at for at, special in enumerate(reversed(added)) if not special), 0)
        if stop - start <= chunk_tokens:
            return [ids or [self.pad_id]]
        # The ids of the text's first window are its own from the first, as a prompt's last letters may merge with the text's.
        lead_ids = self._prompt_ids[prompt] or ids[:lead]
        begins = range(start, stop - overlap, chunk_tokens - overlap)
        return [
            (lead_ids if begin > start else ids[:start]) + ids[begin : min(begin + chunk_tokens, stop)] + ids[stop:]
            for begin in begins
        ]

    def _encodings(self, texts: Sequence[str], prompt: PromptName, **options: Any) -> Iterator[Any]:
        """What the tokenizers library gives for `prompt + text`, of each text."""
        text, first = self.prompts[prompt], 0
        while first < len(texts):
            last, num_characters = first + 1, len(texts[first])
            while last < len(texts) and num_characters + len(texts[last]) <= _CALL_CHARACTERS:
                num_characters += len(texts[last])
                last += 1
            batch = [text + t for t in texts[first:last]]
            yield from self.hf(batch, return_attention_mask=False, return_token_type_ids=False, **options).encodings
            first = last

    def count(self, text: str, prompt: PromptName) -> int:
        """Ids of `prompt + text` before any is cut off."""
        return len(next(self._encodings([text], prompt, verbose=False)).ids)

    def wrap_ids(self, ids: Sequence[Sequence[int]], *, keep: Literal["start", "end"] = "start") -> Tokens:
        """Ids that a caller tokenized itself: taken as they are, without prompt, cut to `max_tokens`."""
        limit = self.max_tokens
        cut = [list(i[:limit] if keep == "start" else i[-limit:]) for i in ids]
        return Tokens(cut, 0, [len(i) > limit for i in ids])

    def tokenize_generation(self, query: str, passage: str, *, max_tokens: int) -> GenerationTokens:
        """Ids of `gen_prompt(query)` followed by the passage and an end token (METHOD: generate).

        Of the room that chat template and query prompt leave, a query gets a third, the passage what the query did not take.

        Raises:
            ModelError: they leave no room.
        """
        room = self.generation_room(max_tokens)
        query = self._cut(query, room // 3)
        prompt_ids = self._generation_prompt(query)
        while query and max_tokens - len(prompt_ids) < room // 2:  # a cut inside a character of many tokens
            query = query[: len(query) // 2]
            prompt_ids = self._generation_prompt(query)
        passage_ids = self.hf(passage, add_special_tokens=False, verbose=False)["input_ids"]
        end = [self.hf.eos_token_id] if self.hf.eos_token_id is not None else []
        passage_ids = ([*passage_ids, *end] or [self.pad_id])[: max_tokens - len(prompt_ids)]
        return GenerationTokens([*prompt_ids, *passage_ids], len(passage_ids))

    def generation_room(self, max_tokens: int) -> int:
        """Tokens left for query and passage beside chat template and query prompt.

        Raises:
            ModelError: fewer than four.
        """
        room = max_tokens - self._generation_overhead
        if room < _LEAST_GENERATION_ROOM:
            raise ModelError(
                f"the chat template and model.prompts.query take {self._generation_overhead} tokens, which leaves no room for "
                f"query and passage within train.max_generation_tokens = {max_tokens} (absent: model.max_tokens); raise it"
            )
        return room

    @cached_property
    def _generation_overhead(self) -> int:
        return len(self._generation_prompt(""))

    def _generation_prompt(self, query: str) -> list[int]:
        """Ids that the passage follows: the family's chat template where there is one, else the query and a line break."""
        query = self.prompts["query"] + query
        if getattr(self.hf, "chat_template", None):
            text = self.hf.apply_chat_template([{"role": "user", "content": query}], tokenize=False, add_generation_prompt=True)
            ids = self.hf(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = self._without_closing_token(self.hf(query + "\n", verbose=False)["input_ids"])
        return ids or [self.pad_id]  # the first scored token is predicted from the last prompt token, so there must be one

    def _cut(self, text: str, max_tokens: int) -> str:
        encoding = self.hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoding["offset_mapping"]
        return text if len(offsets) <= max_tokens else text[: offsets[max_tokens - 1][1]]

    def _ids_of_prompt(self, prompt: str) -> list[int]:
        return self._without_closing_token(self.hf(prompt)["input_ids"]) if prompt else []

    def _without_closing_token(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self.hf.all_special_ids else ids


def load_tokenizer(folder: str, *, trust_remote_code: bool = False) -> Any:
    """The fast tokenizer in a model folder, padding on the right.

    Raises:
        ModelError: there is none, or only a slow one (no offsets, no truncation report).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"no tokenizer can be loaded from {folder}: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer in {folder} is not a fast one; save a tokenizer.json beside it")
    tokenizer.padding_side = "right"
    return tokenizer
