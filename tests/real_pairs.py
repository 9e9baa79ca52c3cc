"""Real query-passage pairs that anyone can make from two Debian packages, in seconds.

    apt-get download wordnet-base python3.11-doc && for deb in *.deb; do dpkg -x $deb x; done
    python tests/real_pairs.py wordnet x/usr/share/wordnet PAIRS
    python tests/real_pairs.py pydoc x/usr/share/doc/python3.11/html PAIRS

`wordnet`: a usage sentence -> the word it shows, with its definition (WordNet 3.0, permissive licence), 38,637 rows to train
and 2,033 to test. `pydoc`: the signature of a Python function, class or constant -> what the manual says of it (PSF-2.0),
7,626 and 382. Writes PAIRS/NAME.train.jsonl.gz and NAME.test.jsonl.gz, rows {"query", "positive"}, split by query.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

TEST_SHARE, SEED = 0.05, 13
MIN_PASSAGE_CHARS = 30
_VOID = {"area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"}  # tags of HTML that nothing closes


def synsets(dictionary: Path) -> Iterator[tuple[list[str], str]]:
    """(words, gloss) of every entry of data.noun, data.verb, data.adj and data.adv (the format is wndb(5WN))."""
    for part in ("noun", "verb", "adj", "adv"):
        for line in (dictionary / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            head, gloss = line.split("|", 1)
            fields = head.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words], gloss.strip()


def wordnet(dictionary: Path) -> Iterator[dict[str, str]]:
    """A row per usage sentence that shows a word of its entry."""
    for words, gloss in synsets(dictionary):
        definition = gloss.split('; "')[0].strip().rstrip(";")
        for sentence in re.findall(r'"([^"]+)"', gloss):
            shown = next((word for word in words if word.lower()[: max(3, len(word) - 2)] in sentence.lower()), None)
            if shown is not None and len(sentence.split()) >= 3:
                yield {"query": sentence.strip(), "positive": f"{shown}: {definition}"}


class _Entries(HTMLParser):
    """Collects (signature, paragraphs) of a page by Sphinx: `<dt class="sig">` and the paragraphs of the `<dd>` after it."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.entries: list[tuple[str, str]] = []
        self._open: list[tuple[str, str]] = []  # (tag, class)
        self._inside: list[dict[str, str]] = []  # entries that are open, the innermost last

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        kind = dict(attrs).get("class") or ""
        if tag == "dl":
            self._inside.append({"signature": "", "passage": ""})
        elif tag == "p" and self._inside:
            self._inside[-1]["passage"] += " "
        self._open.append((tag, kind))

    def handle_endtag(self, tag: str) -> None:
        if tag not in [name for name, _ in self._open]:
            return
        while self._open.pop()[0] != tag:
            pass
        if tag == "dl":
            entry = self._inside.pop()
            self.entries.append((" ".join(entry["signature"].split()), " ".join(entry["passage"].split())))

    def handle_data(self, data: str) -> None:
        if not self._inside:
            return
        last = max(place for place, (tag, _) in enumerate(self._open) if tag == "dl")
        tags, kinds = {tag for tag, _ in self._open[last:]}, " ".join(kind for _, kind in self._open[last:]).split()
        if "headerlink" in kinds or "sig-prename" in kinds:  # the mark beside a heading; the module's name
            return
        if "dt" in tags and "sig" in kinds:
            self._inside[-1]["signature"] += data
        elif "p" in tags and not {"table", "li", "pre"} & tags:
            self._inside[-1]["passage"] += data


def pydoc(pages: Path) -> Iterator[dict[str, str]]:
    """A row per entry of the library's reference with a description of its own."""
    for page in sorted((pages / "library").glob("*.html")):
        parser = _Entries()
        parser.feed(page.read_text(encoding="utf-8"))
        for signature, passage in parser.entries:
            if signature and len(passage) >= MIN_PASSAGE_CHARS:
                yield {"query": signature, "positive": passage}


def write_split(pairs: Iterable[dict[str, str]], name: str, folder: Path) -> None:
    """Both splits; all rows of a query are on one side."""
    rows = list({(row["query"], row["positive"]): row for row in pairs}.values())
    queries = sorted({row["query"] for row in rows})
    random.Random(SEED).shuffle(queries)
    held_out = set(queries[: round(TEST_SHARE * len(queries))])
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        chosen = [row for row in rows if (row["query"] in held_out) == (split == "test")]
        with gzip.open(folder / f"{name}.{split}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        print(f"{split}: {len(chosen):,} pairs", file=sys.stderr)


if __name__ == "__main__":
    name, source, folder = sys.argv[1:]
    write_split({"wordnet": wordnet, "pydoc": pydoc}[name](Path(source)), name, Path(folder))
