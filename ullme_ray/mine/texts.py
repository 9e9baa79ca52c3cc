"""Unique texts under numbers, on local disk: memory holds a digest and a number of each (about 200 bytes), never the texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa

BLOCK_TEXTS = 1024
_SCHEMA = pa.schema([("text", pa.large_string())])


class TextStore:
    """Texts numbered from 0 in the order in which they first come; a text that comes again keeps its number.

    First `add`, then `close`, then read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._numbers: dict[bytes, int] = {}
        self._waiting: list[str] = []
        self._writer: pa.ipc.RecordBatchFileWriter | None = pa.ipc.new_file(str(path), _SCHEMA)
        self._blocks: list[pa.Array] = []

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def num_blocks(self) -> int:
        return -(-len(self) // BLOCK_TEXTS)

    def add(self, text: str) -> int:
        key = _digest(text)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._numbers)
            self._waiting.append(text)
            if len(self._waiting) == BLOCK_TEXTS:
                self._flush()
        return number

    def _flush(self) -> None:
        assert self._writer is not None, "closed"
        self._writer.write_batch(pa.record_batch([pa.array(self._waiting, pa.large_string())], schema=_SCHEMA))
        self._waiting = []

    def close(self) -> None:
        """No text comes any more; from now on they are read from the file as needed."""
        assert self._writer is not None, "closed"
        if self._waiting:
            self._flush()
        self._writer.close()
        self._writer = None
        reader = pa.ipc.open_file(pa.memory_map(str(self._path)))
        self._blocks = [reader.get_batch(i).column(0) for i in range(reader.num_record_batches)]

    def number(self, text: str) -> int | None:
        return self._numbers.get(_digest(text))

    def block(self, number: int) -> list[str]:
        """Texts [number * BLOCK_TEXTS, (number + 1) * BLOCK_TEXTS)."""
        texts: list[str] = self._blocks[number].to_pylist()
        return texts

    def __getitem__(self, number: int) -> str:
        block, row = divmod(number, BLOCK_TEXTS)
        return str(self._blocks[block][row])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
