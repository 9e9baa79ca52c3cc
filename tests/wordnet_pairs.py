"""Real query-passage pairs from WordNet: a usage sentence -> the word it shows, with its definition.

    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb x && python tests/wordnet_pairs.py x/usr/share/wordnet PAIRS

Writes PAIRS/wordnet.train.jsonl.gz and wordnet.test.jsonl.gz, rows {"query", "positive"}: 38,637 and 2,033, split by query,
in seconds. WordNet 3.0's licence is permissive.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TEST_SHARE, SEED = 0.05, 13


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


def pairs(dictionary: Path) -> Iterator[dict[str, str]]:
    """A row per usage sentence that shows a word of its entry."""
    for words, gloss in synsets(dictionary):
        definition = gloss.split('; "')[0].strip().rstrip(";")
        for sentence in re.findall(r'"([^"]+)"', gloss):
            shown = next((word for word in words if word.lower()[: max(3, len(word) - 2)] in sentence.lower()), None)
            if shown is not None and len(sentence.split()) >= 3:
                yield {"query": sentence.strip(), "positive": f"{shown}: {definition}"}


def main(dictionary: Path, folder: Path) -> None:
    rows = list({(row["query"], row["positive"]): row for row in pairs(dictionary)}.values())
    queries = sorted({row["query"] for row in rows})
    random.Random(SEED).shuffle(queries)
    held_out = set(queries[: round(TEST_SHARE * len(queries))])
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        chosen = [row for row in rows if (row["query"] in held_out) == (split == "test")]
        with gzip.open(folder / f"wordnet.{split}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        print(f"{split}: {len(chosen):,} pairs", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
