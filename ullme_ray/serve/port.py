"""The port that listeners hold one after another: no gap between them, and no second holder.

Who can bind it holds it, so a dead process holds nothing. The others wait at a Unix socket of the holder. When it dies, they
see that one closed and try to bind at once; when it ends in good order, it sends its listening socket to the first of them.
Connections that nobody has accepted yet stay in that socket's queue, so none is refused or cut.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import tempfile
from pathlib import Path

_LOOK_AGAIN_S = 0.05
_BACKLOG = 2048


class Port:
    """A host and port of this machine, and a process's turn to listen there."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._meeting = _private_folder() / f"{host.replace(':', '_')}-{port}"
        self._listening: socket.socket | None = None
        self._waiting: list[socket.socket] = []
        self._task: asyncio.Task[None] | None = None

    async def take(self) -> socket.socket:
        """Waits until no other process holds the port; gives the listening socket."""
        while (listening := self._bind() or await self._from_holder()) is None:
            await asyncio.sleep(_LOOK_AGAIN_S)
        listening.setblocking(False)
        self._listening = listening
        self._task = asyncio.create_task(self._receive())
        return listening

    def pass_on(self) -> None:
        """Gives the listening socket to a process that waits, if one does. This one may close its own now, or go on with it."""
        if self._task is None:
            return
        assert self._listening is not None
        self._task.cancel()
        for waiting in self._waiting:
            with contextlib.suppress(OSError):  # it died
                socket.send_fds(waiting, [b"\0"], [self._listening.fileno()])
                break
        else:
            self._meeting.unlink(missing_ok=True)
        for waiting in self._waiting:  # the others try again, and find the new holder
            waiting.close()
        self._waiting = []

    def _bind(self) -> socket.socket | None:
        listening = socket.socket(socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(self._address)
            listening.listen(_BACKLOG)
        except OSError:
            listening.close()
            return None
        return listening

    async def _receive(self) -> None:
        """As the holder: keeps the connections of those who wait."""
        with socket.socket(socket.AF_UNIX) as meeting:
            meeting.setblocking(False)
            self._meeting.unlink(missing_ok=True)  # of the holder before
            meeting.bind(str(self._meeting))
            meeting.listen()
            while True:
                self._waiting.append((await asyncio.get_running_loop().sock_accept(meeting))[0])

    async def _from_holder(self) -> socket.socket | None:
        """The holder's listening socket once it gives it away; None when there is no holder, or none any longer."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as holder:
            holder.setblocking(False)
            try:
                await loop.sock_connect(holder, str(self._meeting))
                readable = asyncio.Event()
                loop.add_reader(holder, readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(holder)
                _, given, _, _ = socket.recv_fds(holder, 1, 1)
            except OSError:
                return None
        return socket.socket(fileno=given[0]) if given else None


def _private_folder() -> Path:
    """Of this user alone, since whoever may connect there may be given the port."""
    folder = Path(tempfile.gettempdir()) / f"ullme-ray-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700 or not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{folder} must be a folder of this user alone (mode 0700); remove it")
    return folder
