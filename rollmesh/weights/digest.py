"""The digest of a transfer. Sender and receivers compare it before a version is committed. Torch-free."""

from __future__ import annotations

import hashlib

Buffer = bytes | bytearray | memoryview


class TransferDigest:
    """SHA-256 over the SHA-256 digests of the buckets, in order.

    The digest has two levels, so that a bucket can be hashed while the next bucket travels, and so that bytes that move
    across the border of two buckets change the result.
    """

    def __init__(self) -> None:
        self._buckets = hashlib.sha256()
        self._num_bytes = 0

    def add(self, bucket: Buffer) -> None:
        """Add the next bucket. Hashing releases the interpreter lock."""
        self._buckets.update(hashlib.sha256(bucket).digest())
        self._num_bytes += memoryview(bucket).nbytes

    @property
    def num_bytes(self) -> int:
        """Bytes added so far."""
        return self._num_bytes

    def digest(self) -> bytes:
        """Return the 32 bytes of the digest; without buckets, the SHA-256 of no bytes."""
        return self._buckets.digest()
