"""The sealed message: a canonical header and a compressed, encrypted body, signed by the device.

    magic "RFE1" | u16 header length | header | u32 body length | body | 64 bytes Ed25519 signature

Integers are big endian. The header is a msgpack array in its one canonical form, the body is HPKE (RFC 9180)
with MLKEM768_X25519, HKDF-SHA256, AES-256-GCM over a zstandard frame, with the header's bytes as `info`; the
signature covers everything before it. docs/wire.md has the table of limits and a worked example.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, TypeAlias

import msgspec
import zstandard
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import (
    AEAD,
    KDF,
    KEM,
    MLKEM768X25519PrivateKey,
    MLKEM768X25519PublicKey,
    Suite,
)
from msgspec import Meta, Struct

from shared.errors import PeerError, TrustError
from shared.wire.identity import Identity
from shared.wire.records import SiteName, UpStage
from shared.wire.stages import MALFORMED, stage_named

VERSION: Literal[1] = 1
HEADER_LIMIT_BYTES = 512
_MAGIC = b"RFE1"
_SIGNED = b"radfleet envelope 1\x00"  # a signature made for this format is good for no other
_SIGNATURE_BYTES = 64
_MLKEM_PUBLIC_BYTES, _MLKEM_SEED_BYTES, _X25519_BYTES = 1184, 64, 32
_ZSTD_LEVEL = 6
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)

MessageId = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
Sequence64 = Annotated[int, Meta(ge=1, le=2**53)]


class Header(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What is said in the open about a sealed message. It names a node, never a patient."""

    version: Literal[1]
    site: SiteName
    node: SiteName
    incarnation: Annotated[str, Meta(pattern="^[0-9a-z]{1,32}$")]  # changes when the node is set up anew
    stage: UpStage
    id: MessageId
    sequence: Sequence64  # 1, 2, 3 ... within an incarnation, never used twice
    round: Annotated[str, Meta(pattern="^[0-9A-Za-z._-]{0,64}$")]  # empty outside rounds
    key_id: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]  # of the recipient's key: SealPublic.key_id
    created: Annotated[int, Meta(ge=0, le=2**53)]  # the node's clock, milliseconds since 1970; information only

    @property
    def identity(self) -> Identity:
        return Identity(self.site, self.node)


Observer: TypeAlias = Callable[[Header, bytes], None]
"""Sees each plaintext record before sealing and after opening; the canary's window (tests/e2e)."""


class SealPublic:
    """The cloud's public key: 1216 bytes, ML-KEM-768 encapsulation key then X25519 public key.

    Raises:
        PeerError: the bytes are no such key.
    """

    def __init__(self, raw: bytes) -> None:
        if len(raw) != _MLKEM_PUBLIC_BYTES + _X25519_BYTES:
            raise PeerError(f"A sealing key has 1216 bytes, this has {len(raw)}.")
        try:
            self.key = MLKEM768X25519PublicKey(
                MLKEM768PublicKey.from_public_bytes(raw[:_MLKEM_PUBLIC_BYTES]),
                X25519PublicKey.from_public_bytes(raw[_MLKEM_PUBLIC_BYTES:]),
            )
        except ValueError as exc:
            raise PeerError("The sealing key is malformed.") from exc
        self.raw = raw
        self.key_id = hashlib.sha256(raw).hexdigest()[:16]


class SealPrivate:
    """The cloud's private key: 96 bytes, ML-KEM-768 seed then X25519 private key.

    Raises:
        PeerError: the bytes are no such key.
    """

    def __init__(self, raw: bytes) -> None:
        if len(raw) != _MLKEM_SEED_BYTES + _X25519_BYTES:
            raise PeerError(f"A private sealing key has 96 bytes, this has {len(raw)}.")
        mlkem = MLKEM768PrivateKey.from_seed_bytes(raw[:_MLKEM_SEED_BYTES])
        x25519 = X25519PrivateKey.from_private_bytes(raw[_MLKEM_SEED_BYTES:])
        self.key = MLKEM768X25519PrivateKey(mlkem, x25519)
        self.raw = raw
        self.public = SealPublic(mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> SealPrivate:
        """Returns a new key from the system's randomness."""
        return cls(MLKEM768PrivateKey.generate().private_bytes_raw() + X25519PrivateKey.generate().private_bytes_raw())


def seal(
    header: Header,
    record: bytes,
    recipient: SealPublic,
    device: Ed25519PrivateKey,
    *,
    observe: Observer | None = None,
) -> bytes:
    """Returns the sealed message.

    Raises:
        PeerError: the record or the sealed message is longer than its stage allows.
    """
    stage = stage_named(header.stage)
    if len(record) > stage.plain_limit:
        raise PeerError(f"A {header.stage} of {len(record)} bytes; the limit is {stage.plain_limit}.")
    if observe is not None:
        observe(header, record)
    named = msgspec.msgpack.encode(header)
    body = _SUITE.encrypt(zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(record), recipient.key, info=named)
    signed = b"".join((_MAGIC, struct.pack(">H", len(named)), named, struct.pack(">I", len(body)), body))
    sealed = signed + device.sign(_SIGNED + signed)
    if len(sealed) > stage.sealed_limit:
        raise PeerError(f"A sealed {header.stage} of {len(sealed)} bytes; the limit is {stage.sealed_limit}.")
    return sealed


def read_header(sealed: bytes) -> Header:
    """Returns the header of a sealed message without believing it: nothing is verified but its form.

    Raises:
        PeerError: a length, limit, field or the canonical form is wrong.
    """
    return _split(sealed)[0]


def open_sealed(
    sealed: bytes,
    recipients: Sequence[SealPrivate],
    devices: Sequence[Ed25519PublicKey],
    *,
    observe: Observer | None = None,
) -> tuple[Header, bytes]:
    """Verifies, decrypts and decompresses a message; `devices` are the keys that may speak for its node.

    The caller compares the header with topic and certificate (`identity.agree`) and refuses replays.

    Raises:
        PeerError: a form or limit is broken, before anything of that length is allocated.
        TrustError: no device key made the signature, it is sealed to another key, or the header was changed.
    """
    header, named, body = _split(sealed)
    signed, signature = sealed[:-_SIGNATURE_BYTES], sealed[-_SIGNATURE_BYTES:]
    if not any(_verifies(key, signature, _SIGNED + signed) for key in devices):
        raise TrustError("No enrolled device key made this signature.")
    recipient = next((key for key in recipients if key.public.key_id == header.key_id), None)
    if recipient is None:
        raise TrustError(f"Sealed to key {header.key_id}, which is not ours.", cure="Enrol the node again.")
    try:
        packed = _SUITE.decrypt(body, recipient.key, info=named)
    except (InvalidTag, ValueError) as exc:
        raise TrustError("The body does not open with our key and this header.") from exc
    record = _decompress(packed, stage_named(header.stage).plain_limit)
    if observe is not None:
        observe(header, record)
    return header, record


def _split(sealed: bytes) -> tuple[Header, bytes, bytes]:
    """Returns header, the header's bytes and the body; every length is checked before it is used."""
    if len(sealed) < 6 or sealed[:4] != _MAGIC:
        raise PeerError("Not a sealed message of version 1.")
    (header_length,) = struct.unpack_from(">H", sealed, 4)
    if header_length > HEADER_LIMIT_BYTES:
        raise PeerError(f"A header of {header_length} bytes; the limit is {HEADER_LIMIT_BYTES}.")
    start = 6 + header_length + 4
    if len(sealed) < start + _SIGNATURE_BYTES:
        raise PeerError("The sealed message is cut short.")
    named = sealed[6 : 6 + header_length]
    header = _read_canonical(named)
    limit = stage_named(header.stage).sealed_limit
    (body_length,) = struct.unpack_from(">I", sealed, 6 + header_length)
    if start + body_length + _SIGNATURE_BYTES > limit:
        raise PeerError(f"A sealed {header.stage} that claims a body of {body_length} bytes; the limit is {limit}.")
    if len(sealed) != start + body_length + _SIGNATURE_BYTES:
        raise PeerError("The sealed message has another length than it claims.")
    return header, named, sealed[start : start + body_length]


def _read_canonical(named: bytes) -> Header:
    try:
        header = msgspec.msgpack.decode(named, type=Header)
    except MALFORMED as exc:
        raise PeerError(f"The header is malformed: {exc}.") from exc
    if msgspec.msgpack.encode(header) != named:
        raise PeerError("The header is not in its canonical form.")
    return header


def _verifies(key: Ed25519PublicKey, signature: bytes, data: bytes) -> bool:
    try:
        key.verify(signature, data)
    except InvalidSignature:
        return False
    return True


def _decompress(packed: bytes, limit: int) -> bytes:
    """Returns the content of one zstandard frame; the frame states its size, more is never allocated."""
    try:
        size = zstandard.frame_content_size(packed)
        if not 0 <= size <= limit:
            raise PeerError(f"The body claims {size} bytes decompressed (-1: unknown); the limit is {limit}.")
        return zstandard.ZstdDecompressor().decompress(packed, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise PeerError(f"The body is not one zstandard frame: {exc}.") from exc
