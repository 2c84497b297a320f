"""Pieces: they fit together exactly, and a lying one is refused before anything is made of it."""

from __future__ import annotations

import hashlib
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import PeerError
from shared.wire.chunks import CHUNK_BYTES, DATA_BYTES, bitmap, missing, pack, unpack, whole_of

LIMIT = 4 * CHUNK_BYTES
ID = "5a" * 16


@pytest.mark.parametrize("length", [1, DATA_BYTES - 1, DATA_BYTES, DATA_BYTES + 1, 3 * DATA_BYTES])
def test_pieces_make_the_whole(length: int) -> None:
    sealed = os.urandom(length)
    whole = whole_of(ID, sealed)
    data = b""
    for index in range(whole.count):
        payload = pack(whole, index, sealed[len(data) : len(data) + whole.length(index)])
        assert len(payload) <= CHUNK_BYTES
        chunk = unpack(payload, LIMIT)
        assert (chunk.whole, chunk.index) == (whole, index)
        data += chunk.data
    assert data == sealed


def raw(total: int, count: int, index: int, data: bytes, magic: bytes = b"RFC1") -> bytes:
    digest = hashlib.sha256(b"").digest()
    return struct.pack(">4s16s32sQII", magic, bytes.fromhex(ID), digest, total, count, index) + data


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "chunk of 0 bytes"),
        (raw(1, 1, 0, b""), "chunk of 68 bytes"),
        (raw(10, 1, 0, b"x" * 10, b"RFC2"), "version"),
        (raw(10, 1, 0, b"x" * 9), "9 bytes, not 10"),  # truncated
        (raw(10, 1, 0, b"x" * 11), "11 bytes, not 10"),
        (raw(10, 1, 1, b"x" * 10), "does not fit"),
        (raw(10, 2, 1, b"x" * 10), "does not fit"),
        (raw(DATA_BYTES + 1, 2, 0, b"x"), f"1 bytes, not {DATA_BYTES}"),
        (raw(LIMIT + 1, 5, 0, b"x"), "limit"),  # claims more than the stage allows
        (raw(2**63, 2**31, 0, b"x"), "limit"),
        (raw(0, 0, 0, b"x"), "limit"),
        (raw(10, 1, 0, b"x" * CHUNK_BYTES), "chunk of"),
    ],
)
def test_attack_lying_chunks(payload: bytes, why: str) -> None:
    with pytest.raises(PeerError, match=why):
        unpack(payload, LIMIT)


@given(st.integers(1, 300), st.data())
def test_bitmap_and_missing_are_opposites(count: int, data: st.DataObject) -> None:
    held = data.draw(st.sets(st.integers(0, count - 1)))
    assert missing(bitmap(held, count), count) == [i for i in range(count) if i not in held]


def test_a_short_bitmap_lacks_the_rest() -> None:
    assert missing(b"", 3) == [0, 1, 2]
    assert missing(b"\xff", 10) == [8, 9]
