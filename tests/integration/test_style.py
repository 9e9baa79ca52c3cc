"""Ruff, the type checker and the spell checker agree with every file of the project."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["codespell_lib", "ullme_ray", "jobs", "tests", "README.md", "CHANGELOG.md"],
    ],
    ids=["lint", "format", "types", "spelling"],
)
def test_tool_finds_nothing(arguments: list[str]) -> None:
    result = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
