"""The report page: sections in the order of the stages, each with its pictures, or a sentence that says what is missing."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ullme_ray import storage
from ullme_ray.report import corpus_map, curves, style
from ullme_ray.report.inputs import (
    Measured,
    MeasuredGeneration,
    MeasuredMteb,
    MeasuredSet,
    Missing,
    check_run,
    read_embed_report,
    read_evaluation,
    read_generation,
    read_mteb,
    read_serve_bench,
)
from ullme_ray.report.pictures import Picture, histogram, measures, scatter, shares
from ullme_ray.report.vectors import (
    Similarity,
    TableSample,
    flatten,
    measure_similarity,
    padding_of_batches,
    sample_table,
)
from ullme_ray.spec.job import JobSpec
from ullme_ray.spec.run_folder import RunFolder

_CSS = (
    """
h2 { font-size: 1.15rem; margin: 2.6rem 0 .3rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
.grid { margin-top: .8rem; }
.grid figure { max-width: 38rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; overflow-wrap: anywhere; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; margin: 1.2rem 0 0; }
.tiles b { display: block; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles span, .note { color: var(--soft); font-size: .9rem; }
.note { margin: .3rem 0 0; }
.missing { margin: .6rem 0; padding: .6rem .9rem; border: 1px dashed var(--rule); border-radius: 6px; overflow-wrap: anywhere; }
.ledger { columns: 22rem; column-gap: 2rem; margin: 1rem 0 0; }
.ledger div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--rule); padding: .2rem 0;
  break-inside: avoid; }
.ledger dt { color: var(--soft); }
.ledger dd { margin: 0; text-align: right; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
table { margin-top: .8rem; }
"""
    + corpus_map.CSS
)
_ROWS_BY_FATE = {
    "embedded": "rows_embedded",
    "copied": "rows_copied",
    "reused": "rows_reused",
    "unusable": "rows_dead",
}


@dataclass(frozen=True)
class Report:
    """What was written, and what could not be drawn."""

    page: str
    pictures: tuple[str, ...]  # names of the PNGs beside the page
    missing: dict[str, str]  # section -> why

    def to_text(self) -> str:
        lines = [f"{self.page}: {len(self.pictures)} pictures, each also as PNG beside it"]
        return "\n".join([*lines, *(f"without {name}: {reason}" for name, reason in self.missing.items())])


@dataclass
class _Draft:
    """The page while it is made."""

    parts: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    tiles: list[tuple[str, str]] = field(default_factory=list)

    def picture(self, picture: Picture) -> str:
        self.pictures.append(picture)
        note = f'<p class="note">{html.escape(picture.note)}</p>' if picture.note else ""
        title = html.escape(picture.title)
        return f'<figure id="{picture.name}"><figcaption>{title}</figcaption>{picture.svg()}{note}</figure>'

    def add(self, *parts: str) -> None:
        self.parts += parts

    def lack(self, name: str, reason: str) -> None:
        self.missing[name] = reason
        self.add(f'<p class="missing" data-missing="{html.escape(name)}">Not here: {html.escape(reason)}.</p>')

    def grid(self, pictures: Iterable[Picture]) -> None:
        self.add('<div class="grid">', *(self.picture(picture) for picture in pictures), "</div>")


_Found = TypeVar("_Found")


def write_report(job: JobSpec, *, num_queries: int = 100) -> Report:
    """Writes `report/index.html` and its pictures into the run's folder, from what the stages left there.

    Args:
        num_queries: held-out queries to encode for the similarities, with the base and the trained model; 0 loads no model.

    Raises:
        UllmeError: the job has not run at all, or its folder cannot be read or written.
    """
    check_run(job)
    draft = _Draft()
    _section(draft, "Training", "training", lambda: _records(job), lambda found: _training(draft, job, found))
    _section(draft, "Retrieval", "retrieval", lambda: read_evaluation(job), lambda found: _retrieval(draft, found))
    _section(draft, "Generation", "generation", lambda: read_generation(job), lambda found: _generation(draft, found))
    _section(draft, "MTEB", "mteb", lambda: read_mteb(job), lambda found: _mteb(draft, found))
    _section(
        draft,
        "Similarities of held-out pairs",
        "similarities",
        lambda: measure_similarity(job, num_queries),
        lambda found: _similarities(draft, found),
    )
    _section(draft, "The corpus", "corpus", lambda: sample_table(job), lambda found: _corpus(draft, found, job.seed))
    _section(draft, "The last embed run", "embed run", lambda: read_embed_report(job), lambda found: _ledger(draft, found))
    _section(draft, "Serving", "serving", lambda: read_serve_bench(job), lambda found: _serving(draft, found))

    folder = storage.join(RunFolder.of(job).root, "report")
    for picture in draft.pictures:
        storage.write_bytes(storage.join(folder, f"{picture.name}.png"), picture.png())
    place = storage.join(folder, "index.html")
    storage.write_text(place, style.page(f"{job.name}: report", "\n".join([_head(job, draft), *draft.parts]), css=_CSS))
    return Report(place, tuple(picture.name for picture in draft.pictures), draft.missing)


def _section(draft: _Draft, title: str, name: str, read: Callable[[], _Found], show: Callable[[_Found], None]) -> None:
    draft.add(f"<h2>{html.escape(title)}</h2>")
    try:
        found = read()
    except Missing as reason:
        draft.lack(name, str(reason))
        return
    show(found)


def _head(job: JobSpec, draft: _Draft) -> str:
    facts = [job.model.base, f"pooling {job.model.pooling}", f"at most {job.model.max_tokens} tokens", job.model.dtype]
    tiles = "".join(f"<div><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>" for value, name in draft.tiles)
    return f'<h1>{html.escape(job.name)}</h1>\n<p>{html.escape("; ".join(facts))}</p>\n<div class="tiles">{tiles}</div>'


def _records(job: JobSpec) -> list[dict[str, Any]]:
    folder = RunFolder.of(job).metrics
    records = curves.read_records(folder)
    if not curves.panels_of(records):
        raise Missing(
            f"{folder}/train.jsonl holds no step; `ullme-ray train` writes it" if job.train else "the job has no train section"
        )
    return records


def _training(draft: _Draft, job: JobSpec, records: Sequence[dict[str, Any]]) -> None:
    draft.tiles.append((f"{records[-1]['step']:,}", "steps"))
    for label, name, form in (("last loss", "loss", "{:.3f}"), ("tokens/s, median", "tokens_per_s", "{:,.0f}")):
        values = [value for _, value in curves.points_of(records, name)]
        if values:
            draft.tiles.append((form.format(values[-1] if name == "loss" else float(np.median(values))), label))
    if job.train:
        draft.add(f'<p class="note">{html.escape(curves.facts(job, records))}</p>')
    panels = curves.panels_of(records)
    draft.grid(_of_panel(panel, records) for panel in panels)
    draft.add(curves.values_table(panels, records))
    if not any(panel.title.startswith("validation") for panel in panels):
        draft.lack("validation", _no_validation(job))


def _no_validation(job: JobSpec) -> str:
    if job.train is not None and job.train.validation is not None:
        return "the steps so far hold no nDCG; train.validation measures it at later ones"
    return "nDCG over steps needs train.validation, a held-out set that is measured while the model trains"


def _of_panel(panel: curves.Panel, records: Sequence[dict[str, Any]]) -> Picture:
    name = "-".join(panel.title.lower().replace("(", "").replace(")", "").replace(",", "").split())
    return Picture(name, panel.title, lambda axes: curves.draw_panel(axes, panel, records))


def _retrieval(draft: _Draft, sets: Sequence[MeasuredSet]) -> None:
    for number, found in enumerate(sets):
        if not found.models:
            continue
        draft.add(f"<h3>{html.escape(found.path)}</h3>")
        draft.add(f'<p class="note">{found.num_queries:,} queries, {found.num_passages:,} passages; 95 % intervals</p>')
        first = next(iter(found.models[0].measures))
        draft.grid([measures(f"retrieval-{number}", f"{first} on set {number + 1}", found.models, first)])
        names = list(dict.fromkeys(name for model in found.models for name in model.measures))
        rows = [[model.model, *(_measure_cell(model, name) for name in names)] for model in found.models]
        draft.add(_table(["model", *names], rows))
        if found.comparisons:
            draft.add(_table(["better", "worse", f"difference of {first}", "p, adjusted"], found.comparisons))
        if number == 0:
            shown = [model for model in found.models if model.model in ("trained", "bm25", "base") and first in model.measures]
            draft.tiles += [(f"{model.measures[first]:.3f}", f"{first}, {model.model}") for model in shown]


def _generation(draft: _Draft, found: MeasuredGeneration) -> None:
    counts = f"{found.num_rows:,} rows, {found.num_passages:,} passages"
    draft.add(f'<p class="note">{html.escape(found.path)}: {counts}; 95 % intervals</p>')
    if found.rows:
        draft.add(_table(["model", "perplexity", "preference accuracy", "Kendall's tau"], found.rows))
    draft.add(*(f'<p class="note">{html.escape(note)}</p>' for note in found.notes))
    draft.add(
        '<p class="note">Perplexity: of the positives given the query; lower is better. Preference: how often a positive is '
        "likelier than the row's own negatives. Tau: whether cosine and likelihood rank a query's passages alike.</p>"
    )


def _mteb(draft: _Draft, found: MeasuredMteb) -> None:
    draft.add(f'<p class="note">{html.escape(found.model)}, revision {html.escape(found.revision[:12])}</p>')
    if found.rows:
        draft.add(_table(["task", "type", "measure", "score"], found.rows))
    for task, reason in found.failed.items():
        draft.lack(f"mteb {task}", reason)


def _measure_cell(model: Measured, name: str) -> str:
    if name not in model.measures:
        return ""
    bounds = model.intervals.get(name)
    return f"{model.measures[name]:.4f}" + (f" ({bounds[0]:.3f} to {bounds[1]:.3f})" if bounds else "")


def _similarities(draft: _Draft, models: Sequence[Similarity]) -> None:
    pictures = []
    for found in models:
        values = {"own passage": found.positives, "others' passages": found.negatives}
        if len(found.negatives):
            title = f"cosine of queries and passages, {found.model} model"
            pictures.append(histogram(f"similarity-{found.model}", title, values, unit="cosine"))
    draft.grid(pictures)
    rows = [
        [
            found.model,
            f"{found.positives.mean():.3f}",
            f"{found.negatives.mean():.3f}" if len(found.negatives) else "",
            f"{found.alignment:.3f}",
            f"{found.uniformity:.3f}" if found.uniformity is not None else "",
        ]
        for found in models
    ]
    draft.add(_table(["model", "own passage", "others' passages", "alignment", "uniformity"], rows))
    draft.add(
        f'<p class="note">{len(models[-1].positives):,} held-out queries. Alignment: mean squared distance of a query and its '
        "passage. Uniformity: how evenly passages fill the sphere, as a logarithm. Lower is better for both.</p>"
    )


def _corpus(draft: _Draft, sample: TableSample, seed: int) -> None:
    draft.tiles.append((f"{sample.table_rows:,}", "rows in the table"))
    seen = "all" if len(sample.num_tokens) == sample.table_rows else f"{len(sample.num_tokens):,}"
    lengths = histogram(
        "lengths",
        "tokens of a text",
        {"tokens": sample.num_tokens},
        unit="tokens",
        note=f"{seen} of {sample.table_rows:,} rows; {sample.truncated:,} of these were cut",
    )
    padding = histogram(
        "padding",
        "padding in batches of 32 of these texts",
        padding_of_batches(sample.num_tokens),
        unit="share of positions that is padding",
        note="what batches of these lengths would waste; the embed run below tells its own padding",
    )
    draft.grid([lengths, padding])
    method, points = flatten(sample.vectors, seed=seed)
    note = f"{len(points):,} rows, {method}: near each other where their vectors are"
    title = "map of the corpus"
    draft.pictures.append(scatter("map-of-the-corpus", title, points, sample.groups, sample.group_labels, note))
    draft.add(f"<h3>{title}</h3>", f'<p class="note">{note}; point at one to read it</p>')
    draft.add(corpus_map.map_html(sample, points))


def _ledger(draft: _Draft, found: Mapping[str, Any]) -> None:
    parts = {label: found.get(name) for label, name in _ROWS_BY_FATE.items()}
    counts = {label: count for label, count in parts.items() if isinstance(count, int)}
    if any(counts.values()):
        draft.grid([shares("rows-by-fate", "rows by what became of them", counts)])
    if found.get("tokens_per_s"):
        draft.tiles.append((f"{found['tokens_per_s']:,.0f}", "tokens/s embedded"))
    lines = [
        f"<div><dt>{html.escape(_words(name))}</dt><dd>{html.escape(_value(name, value))}</dd></div>"
        for name, value in found.items()
    ]
    draft.add('<dl class="ledger">', *lines, "</dl>")


def _serving(draft: _Draft, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    draft.add(_table([_words(name) for name in names], [[_value(name, row.get(name, "")) for name in names] for row in rows]))


def _words(name: str) -> str:
    """`tokens_per_s` -> tokens/s."""
    return name.replace("_per_s", "/s").replace("_", " ")


def _value(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        if name.endswith("_share") or name == "mfu":
            return f"{value:.1%}"
        return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
    return ", ".join(map(str, value)) if isinstance(value, list) and value else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "\n".join(
        f"<tr><th>{html.escape(row[0])}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table>\n<thead><tr>{first}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
