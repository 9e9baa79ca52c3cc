"""What a process read last stays open, so that the next unit of the same file goes on from there.

Without it, each unit of a compressed file, or of a large Parquet row group, would decode all that lies before it: the square of
the file's size. So each process that reads goes through such a file once. Costs one open file and its buffers a process.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from ullme_ray import storage
from ullme_ray.embed.units import InputFile
from ullme_ray.row_files import open_unpacked, skip

Source = TypeVar("Source")


@dataclass(frozen=True)
class _Kept:
    key: Hashable
    source: Any
    open_files: contextlib.ExitStack


_kept: list[_Kept] = []  # at most one


@contextlib.contextmanager
def kept_open(
    key: Hashable, open_source: Callable[[], contextlib.AbstractContextManager[Source]], usable: Callable[[Source], bool]
) -> Iterator[Source]:
    """The source that was opened last, if it is of this key (which says file, version and all else) and usable, or a new one.

    It stays open if the block ends well.
    """
    with contextlib.ExitStack() as open_files:
        source = None
        while _kept:
            last = _kept.pop()
            if source is None and last.key == key and usable(last.source):
                source = last.source
                open_files.push(last.open_files)
            else:
                last.open_files.close()
        if source is None:
            source = open_files.enter_context(open_source())
        yield source
        _kept.append(_Kept(key, source, open_files.pop_all()))


@dataclass
class TextStream:
    """The decompressed bytes of a file; who reads from it says where it stands then."""

    stream: io.BufferedReader
    position: int = 0


@contextlib.contextmanager
def text_at(file: InputFile, offset: int) -> Iterator[TextStream]:
    """The decompressed bytes of a file from `offset` on."""

    @contextlib.contextmanager
    def open_text() -> Iterator[TextStream]:
        with storage.open_read(file.path) as stream:
            yield TextStream(open_unpacked(stream, file.path))

    with kept_open(file, open_text, usable=lambda text: text.position <= offset) as text:
        skip(text.stream, offset - text.position)
        text.position = offset
        yield text
