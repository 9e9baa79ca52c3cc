"""API keys of the server: read where they are checked, held only as hashes."""

from __future__ import annotations

import hashlib
import hmac
import os

from ullme_ray.errors import ServeError
from ullme_ray.spec.secrets import SecretRef


class KeyRing:
    """Tells an accepted key from any other in constant time.

    Args:
        reference: where the keys are (one per line, or separated by commas); None accepts every request.

    Raises:
        UllmeError: the reference cannot be read, or holds no key.
    """

    def __init__(self, reference: SecretRef | None) -> None:
        self._pepper = os.urandom(32)  # so that the hashes in memory are worth nothing elsewhere
        self._required = reference is not None
        self._hashes: list[bytes] = []
        if reference is not None:
            self._hashes = [self._hash(key.get_secret_value().encode()) for key in reference.reveal_list()]
            if not self._hashes:
                raise ServeError(f"serve.api_keys = {reference.reference} holds no key; write one per line")

    def accepts(self, authorization: bytes) -> bool:
        """Whether an `Authorization` header (`Bearer <key>`) opens the server."""
        if not self._required:
            return True
        scheme, _, key = authorization.partition(b" ")
        digest = self._hash(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]  # all of them, always
        return scheme.lower() == b"bearer" and any(matches)

    def _hash(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._pepper).digest()
