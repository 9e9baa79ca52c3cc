"""The causal pass of a job's model: the base as it came, or the export with the head that its embedding table shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ullme_ray.model import encoder_folder
from ullme_ray.model.backbone import load_causal_lm, load_config
from ullme_ray.model.encode import pad_batch
from ullme_ray.model.encoder import Which, read_settings
from ullme_ray.model.family import generates
from ullme_ray.model.tokenizing import TextTokenizer, load_tokenizer
from ullme_ray.model.two_pass import GenerationBatch, passage_logps
from ullme_ray.spec import JobSpec

TEXTS_PER_FORWARD = 8  # logits are (texts, tokens, vocabulary)


def why_not(job: JobSpec, which: Which) -> str:
    """Why this model's generation cannot be measured; empty where it can.

    An export holds the backbone that encodes. It is also the one that generates where both passes share their weights, with a
    head that is the table of embeddings.
    """
    folder = encoder_folder(job, which)
    config = load_config(folder, trust_remote_code=job.model.trust_remote_code)
    if not generates(config):
        return "an encoder has no generation pass"
    if which == "trained":
        if job.model.lora is not None and job.model.lora.adapters == "separate":
            return "the adapter that generates is not exported (model.lora.adapters = separate)"
        if not config.get_text_config().tie_word_embeddings:
            return "the export leaves out the language-model head, which this family does not share with its embeddings"
    return ""


class GenerationModel:
    """A Ray actor's content: scores passages given queries."""

    def __init__(self, job: JobSpec, which: Which, max_tokens: int, device: str | None) -> None:
        folder = encoder_folder(job, which)
        settings = read_settings(job, folder)
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = job.model.model_copy(update={"lora": None})
        self._lm = load_causal_lm(folder, model, device=self._device)
        self._max_tokens = max_tokens
        self._tokenizer = TextTokenizer(
            load_tokenizer(folder, trust_remote_code=model.trust_remote_code),
            max_tokens=settings.max_tokens,
            query_prompt=settings.query_prompt,
            passage_prompt=settings.passage_prompt,
        )

    @torch.inference_mode()
    def score(self, rows: Sequence[tuple[str, Sequence[str]]]) -> list[list[tuple[float, int]]]:
        """(summed log-probability, number of scored tokens) of every passage of every row."""
        pairs = [(query, passage) for query, passages in rows for passage in passages]
        scored = [self._tokenizer.tokenize_generation(q, p, max_tokens=self._max_tokens) for q, p in pairs]
        totals = [0.0] * len(scored)
        order = sorted(range(len(scored)), key=lambda number: len(scored[number].input_ids))
        for start in range(0, len(order), TEXTS_PER_FORWARD):
            numbers = order[start : start + TEXTS_PER_FORWARD]
            padded = pad_batch([scored[n].input_ids for n in numbers], 0, self._tokenizer.pad_id)
            lengths = torch.tensor([scored[n].passage_length for n in numbers])
            batch = GenerationBatch(padded.input_ids, padded.attention_mask, lengths).to(self._device)
            for number, total in zip(numbers, passage_logps(self._lm, batch).total.tolist()):
                totals[number] = total
        found = iter(zip(totals, (s.passage_length for s in scored)))
        return [[next(found) for _ in passages] for _, passages in rows]
