"""The digest of a transfer: what sender and receivers compare before a version is committed. Torch-free."""

from __future__ import annotations

import hashlib

Buffer = bytes | bytearray | memoryview


class TransferDigest:
    """SHA-256 over the SHA-256 digests of the buckets, in order.

    Two levels, so that a bucket can be hashed while the next one travels, and so that moving bytes across the border
    of two buckets changes the result.
    """

    def __init__(self) -> None:
        self._buckets = hashlib.sha256()
        self._num_bytes = 0

    def add(self, bucket: Buffer) -> None:
        """Take the next bucket. Releases the interpreter lock while it hashes."""
        self._buckets.update(hashlib.sha256(bucket).digest())
        self._num_bytes += memoryview(bucket).nbytes

    @property
    def num_bytes(self) -> int:
        """Bytes taken so far."""
        return self._num_bytes

    def digest(self) -> bytes:
        """32 bytes; for no buckets the SHA-256 of nothing."""
        return self._buckets.digest()
