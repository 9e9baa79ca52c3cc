"""Runs in TREC's format, which trec_eval, ranx and ir_measures read: `query Q0 passage rank score tag`, one hit a line."""

from __future__ import annotations

from collections.abc import Iterator

from ullme_ray.retrieval.metrics import Run, rank


def trec_lines(run: Run, tag: str) -> Iterator[str]:
    """The run's lines, each query's hits best first. Ids with white space are written with `%20` and the like, as in a URL."""
    for query, scores in run.items():
        for place, passage in enumerate(rank(scores), start=1):
            # 9 digits tell every float32 from its neighbours, so that ties and order survive.
            yield f"{_field(query)} Q0 {_field(passage)} {place} {scores[passage]:.9g} {_field(tag)}\n"


def _field(text: str) -> str:
    """A field must be one word; `%` itself is escaped too, so that no two ids become one."""
    if not any(character.isspace() or character == "%" for character in text):
        return text
    return "".join(
        "".join(f"%{byte:02X}" for byte in character.encode()) if character.isspace() or character == "%" else character
        for character in text
    )
