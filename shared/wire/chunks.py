"""A sealed message in pieces of at most 256 KiB, each of which says what whole it belongs to.

    magic "RFC1" | 16 bytes message id | 32 bytes SHA-256 of the whole | u64 total | u32 count | u32 index |
    data

Every piece but the last carries exactly DATA_BYTES, so `total` fixes `count` and every length; a piece that
says otherwise is refused. Pieces are collected by bitmap (bit i of byte i // 8, least significant first).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection
from dataclasses import dataclass

from shared.errors import PeerError

CHUNK_BYTES = 256 * 1024
_HEAD = struct.Struct(">4s16s32sQII")
DATA_BYTES = CHUNK_BYTES - _HEAD.size  # 262,076
_MAGIC = b"RFC1"


@dataclass(frozen=True, slots=True)
class Whole:
    """The message that pieces belong to; two sealings under one id are two wholes."""

    id: str  # 32 hexadecimal digits, as in the sealed header
    digest: bytes  # SHA-256 of the sealed message
    total: int  # bytes

    @property
    def count(self) -> int:
        """How many pieces it has; at least one."""
        return -(-self.total // DATA_BYTES)

    def length(self, index: int) -> int:
        """Returns how many bytes of data piece `index` carries."""
        return min(DATA_BYTES, self.total - index * DATA_BYTES)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One piece."""

    whole: Whole
    index: int
    data: bytes


def whole_of(message_id: str, sealed: bytes) -> Whole:
    """Returns what every piece of `sealed` says about the whole."""
    return Whole(message_id, hashlib.sha256(sealed).digest(), len(sealed))


def pack(whole: Whole, index: int, data: bytes) -> bytes:
    """Returns the bytes of one piece."""
    head = _HEAD.pack(_MAGIC, bytes.fromhex(whole.id), whole.digest, whole.total, whole.count, index)
    return head + data


def unpack(payload: bytes, limit: int) -> Chunk:
    """Reads one piece of a message that may have at most `limit` bytes in all.

    Raises:
        PeerError: the form, the limit, the count, the index or the length is wrong.
    """
    if not _HEAD.size < len(payload) <= CHUNK_BYTES:
        raise PeerError(f"A chunk of {len(payload)} bytes; allowed are {_HEAD.size + 1} to {CHUNK_BYTES}.")
    magic, message_id, digest, total, count, index = _HEAD.unpack_from(payload)
    if magic != _MAGIC:
        raise PeerError("Not a chunk of version 1.")
    if not 0 < total <= limit:
        raise PeerError(f"A chunk claims {total} bytes in all; the limit is {limit}.")
    whole = Whole(message_id.hex(), digest, total)
    if count != whole.count or index >= count:
        raise PeerError(f"Chunk {index} of {count} does not fit {total} bytes in all.")
    if len(payload) - _HEAD.size != whole.length(index):
        raise PeerError(f"Chunk {index} has {len(payload) - _HEAD.size} bytes, not {whole.length(index)}.")
    return Chunk(whole, index, payload[_HEAD.size :])


def bitmap(held: Collection[int], count: int) -> bytes:
    """Returns the bitmap of the pieces held, ceil(count / 8) bytes."""
    bits = bytearray(-(-count // 8))
    for index in held:
        bits[index // 8] |= 1 << (index % 8)
    return bytes(bits)


def missing(held: bytes, count: int) -> list[int]:
    """Returns the pieces that a bitmap lacks, in order; bytes beyond its end count as lacking."""
    return [i for i in range(count) if i // 8 >= len(held) or not held[i // 8] >> (i % 8) & 1]
