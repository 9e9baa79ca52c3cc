"""README tells the truth: its generated parts are what is generated, its test command is CI's, its commands and files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import readme
import typer

from ullme_ray.cli import app
from ullme_ray.spec import load_job

ROOT = Path(__file__).parents[2]
TEXT = readme.README.read_text(encoding="utf-8")


def commands() -> list[str]:
    """Lines of README's shell blocks, without those that show output."""
    blocks = re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    assert len(found) >= 6
    return found


def test_generated_parts_are_up_to_date() -> None:
    assert readme.generated(TEXT) == TEXT, "run: python tests/readme.py"


def test_ci_runs_exactly_the_test_command() -> None:
    test_command = next(line for line in commands() if "[test]" in line and "/pytest" in line)
    script = (ROOT / ".ci" / "run").read_text()
    assert test_command in script.splitlines()


def test_every_command_of_the_tool_that_readme_shows_exists_and_parses() -> None:
    group = typer.main.get_command(app)
    shown = [line for line in commands() if "ullme-ray " in line]
    assert len(shown) >= 5
    for line in shown:
        words = shlex.split(line.split("ullme-ray ", 1)[1])
        assert words[0] in group.commands, line  # type: ignore[attr-defined]
        group.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=False)  # type: ignore[attr-defined]
        for word in words[1:]:
            if word.startswith("jobs/"):
                load_job(ROOT / word)


def test_links_and_paths_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    paths = re.findall(r"`((?:ullme_ray|jobs|tests|cluster)/[\w./]+)`", TEXT)
    assert len(links) + len(paths) >= 10
    missing = [path for path in links + paths if not (ROOT / path).exists()]
    assert missing == []
