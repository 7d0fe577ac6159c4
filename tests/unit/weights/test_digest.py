"""What sender and receivers compare."""

from __future__ import annotations

import hashlib

from hypothesis import given, settings
from hypothesis import strategies as st

from rollmesh.weights.digest import TransferDigest


def digest_of(*buckets: bytes) -> bytes:
    digest = TransferDigest()
    for bucket in buckets:
        digest.add(bucket)
    return digest.digest()


def test_it_is_the_sha256_of_the_buckets_sha256s() -> None:
    expected = hashlib.sha256(hashlib.sha256(b"one").digest() + hashlib.sha256(b"two").digest()).digest()
    assert digest_of(b"one", b"two") == expected


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=200), st.data())
def test_any_flipped_bit_changes_it(payload: bytes, data: st.DataObject) -> None:
    flipped = bytearray(payload)
    flipped[data.draw(st.integers(0, len(payload) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest_of(bytes(flipped)) != digest_of(payload)


def test_moving_a_byte_across_a_border_or_swapping_buckets_changes_it() -> None:
    assert len({digest_of(b"ab", b"c"), digest_of(b"a", b"bc"), digest_of(b"c", b"ab"), digest_of(b"abc")}) == 4


def test_it_counts_bytes_whatever_the_buffer_holds() -> None:
    digest = TransferDigest()
    digest.add(memoryview(b"12345678").cast("I"))
    digest.add(b"xyz")
    assert digest.num_bytes == 11
