"""API keys of the server: read where they are checked, held only as hashes, read again when their file changes."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import time
from pathlib import Path

from ullme_ray.errors import ServeError, UllmeError
from ullme_ray.spec.secrets import SecretRef

logger = logging.getLogger("ray.serve")

LOOK_AGAIN_S = 1.0  # how soon a changed file counts


class KeyRing:
    """Tells an accepted key from any other in constant time.

    Args:
        reference: where the keys are (one per line, or separated by commas); None accepts every request. A `file:` is read
            again when it changes, so keys are rotated without a restart; a file that is unreadable or empty changes nothing.

    Raises:
        UllmeError: the reference cannot be read, or holds no key.
    """

    def __init__(self, reference: SecretRef | None) -> None:
        self._pepper = os.urandom(32)  # so that the hashes in memory are worth nothing elsewhere
        self._reference = reference
        self._hashes: list[bytes] = []
        self._version = self._file_version()
        self._looked_at = time.monotonic()
        if reference is not None:
            self._hashes = self._read(reference)

    def accepts(self, authorization: bytes) -> bool:
        """Whether an `Authorization` header (`Bearer <key>`) opens the server."""
        return self.identify(authorization) is not None

    def identify(self, authorization: bytes) -> str | None:
        """A name for the key of an accepted header, the same as long as this process lives; None where it opens nothing."""
        if self._reference is None:
            return "anyone"
        self._look_again(self._reference)
        scheme, _, key = authorization.partition(b" ")
        digest = self._hash(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]  # all of them, always
        return digest.hex()[:8] if scheme.lower() == b"bearer" and any(matches) else None

    def _look_again(self, reference: SecretRef) -> None:
        now = time.monotonic()
        if now < self._looked_at + LOOK_AGAIN_S:
            return
        self._looked_at = now
        version = self._file_version()
        if version == self._version:
            return
        self._version = version
        try:
            self._hashes = self._read(reference)
        except (UllmeError, OSError, ValueError) as error:
            logger.warning("the API keys changed, but those known before stay: %s", error)

    def _read(self, reference: SecretRef) -> list[bytes]:
        hashes = [self._hash(key.get_secret_value().encode()) for key in reference.reveal_list()]
        if not hashes:
            raise ServeError(f"serve.api_keys = {reference.reference} holds no key; write one per line")
        return hashes

    def _file_version(self) -> tuple[int, int, int] | None:
        """Changes with the file; None without one. A mounted Kubernetes secret is a link that moves: stat follows it."""
        kind, _, target = (self._reference.reference if self._reference else "").partition(":")
        if kind != "file":
            return None
        try:
            found = Path(target).expanduser().stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._pepper).digest()


class RateLimit:
    """A bucket of requests for each key: full at first, filled again evenly over a minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # key's name -> what was left, and when

    def take(self, key: str, now: float) -> tuple[int, int]:
        """(requests left, 0) where the key may ask, else (0, seconds until it may)."""
        left, since = self._buckets.get(key, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / 60)
        if left < 1:
            self._buckets[key] = left, now
            return 0, max(1, math.ceil((1 - left) * 60 / self.per_minute))
        self._buckets[key] = left - 1, now
        return int(left - 1), 0
