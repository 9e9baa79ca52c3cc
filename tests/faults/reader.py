"""A reader that polls a table while jobs write it: `python tests/faults/reader.py`, driven by lines on stdin.

A line is JSON: {"table": path, "states": [[rows, digest], ...]} begins to watch, {} ends it and prints what was seen. A state
is one that readers may see, from `state_of`; [0, ""] stands for no table at all. Every poll looks for the newest version. One
not seen before is read, all ids and vectors, and so is any at every tenth poll: a version whose parts are missing or cut short
is seen, be it a little later; reading at every poll would take more of the machine than the job under test.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import sys
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from ullme_ray.table import delta_options

POLL_S = 0.05
_READ_EVERY = 10  # polls
_COLUMNS = ["id", "chunk", "embedding"]
_UNANSWERED = ("error sending request", "onnection", "timed out", "status: 5", "status code: 5")


def state_of(rows: pa.Table) -> list[Any]:
    """Number of rows, and a digest of their ids that does not depend on their order."""
    ids = sorted(f"{key} {chunk}" for key, chunk in zip(rows["id"].to_pylist(), rows["chunk"].to_pylist()))
    return [len(ids), hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]]


def read_table(path: str) -> pa.Table:
    """Ids and vectors of the newest version."""
    table = DeltaTable(path, storage_options=delta_options(path))
    return table.to_pyarrow_table(columns=_COLUMNS)


class Watch:
    """One table, as a reader sees it that looks again and again."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._table: DeltaTable | None = None
        self._looks = 0
        self._state: list[Any] = [0, ""]

    def look(self) -> tuple[list[Any] | None, str]:
        """The state that a reader sees now, or None and why it is torn or unanswered."""
        self._looks += 1
        try:
            before = self._table.version() if self._table else None
            if self._table is None:
                self._table = DeltaTable(self._path, storage_options=delta_options(self._path))
            else:
                self._table.update_incremental()
            if before == self._table.version() and self._looks % _READ_EVERY:
                return self._state, ""
            rows = self._table.to_pyarrow_table(columns=_COLUMNS)
        except TableNotFoundError:
            return [0, ""], ""
        except Exception as error:  # noqa: BLE001 - whatever a reader may be shown
            self._table = None
            return None, f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
        vectors = rows["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        if not np.isfinite(vectors).all():
            return None, "vectors are not finite"
        self._state = state_of(rows)
        return self._state, ""


def main() -> None:
    commands: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            commands.put(json.loads(line))
        commands.put(None)

    threading.Thread(target=listen, daemon=True).start()
    while (command := commands.get()) is not None:
        watch(command["table"], command["states"], commands)


def watch(table: str, allowed: list[list[Any]], commands: queue.Queue[dict[str, Any] | None]) -> None:
    """Polls until the next command comes, and once more after it."""
    torn: list[str] = []
    seen: list[int] = []
    polls, unanswered, ended, reader = 0, 0, False, Watch(table)
    while True:
        began = time.monotonic()
        state, why = reader.look()
        polls += 1
        if state is None and any(mark in why for mark in _UNANSWERED):
            unanswered += 1
        elif state not in allowed:
            torn.append(why or f"{state} is none of {allowed}")
        elif not seen or seen[-1] != allowed.index(state):
            seen.append(allowed.index(state))
        if ended:
            break
        with contextlib.suppress(queue.Empty):
            commands.get(timeout=max(0.0, POLL_S - (time.monotonic() - began)))
            ended = True
    print(json.dumps({"polls": polls, "torn": torn, "unanswered": unanswered, "seen": seen}), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # the thread that waits for stdin would hold up, or break, an orderly exit
