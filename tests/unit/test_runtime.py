"""Interrupts of a running command, in a process of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

DROPPED = """
import os, signal, sys, weakref
from ullme_ray import runtime

class Thing: pass

runtime._hear_interrupts()
thing = Thing()
weak = weakref.ref(thing, lambda _: os.kill(os.getpid(), getattr(signal, sys.argv[1])))
del thing  # the interrupt is raised in the callback, where Python drops it
print("went on")
try:
    runtime.check_interrupt()
except KeyboardInterrupt:
    print("remembered")
runtime.wait_for_interrupt()
print("stopped")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_python_drops_is_remembered(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", DROPPED, name], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == ["went on", "remembered", "stopped", ""]
    assert "KeyboardInterrupt" in done.stderr  # Python's word that it dropped one: else this test shows nothing


def test_what_a_shell_told_to_ignore_stays_ignored() -> None:
    code = (
        "import signal; from ullme_ray import runtime; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        "runtime._hear_interrupts(); signal.raise_signal(signal.SIGINT); print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "went on\n"
