"""Documents the cloud signs for its nodes (receipts, desired state): 64 bytes of Ed25519, then payload."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shared.errors import PeerError, TrustError
from shared.wire.records import DownStage
from shared.wire.stages import decode, encode

LIMIT_BYTES = {"receipt": 4 * 1024, "desired": 192 * 1024}
_SIGNATURE_BYTES = 64

_T = TypeVar("_T", bound=msgspec.Struct)


def sign(payload: bytes, key: Ed25519PrivateKey, stage: DownStage) -> bytes:
    """Returns the signed document; the stage is under the signature, so one kind never passes for another.

    Raises:
        PeerError: the document is longer than its stage allows.
    """
    if len(payload) + _SIGNATURE_BYTES > LIMIT_BYTES[stage]:
        raise PeerError(f"A {stage} of {len(payload)} bytes; the limit is {LIMIT_BYTES[stage] - _SIGNATURE_BYTES}.")
    return key.sign(_signed(stage) + payload) + payload


def verify(document: bytes, key: Ed25519PublicKey, stage: DownStage) -> bytes:
    """Returns the payload of a signed document.

    Raises:
        PeerError: it is too short or too long.
        TrustError: the signature is not by `key` for this stage.
    """
    if not _SIGNATURE_BYTES < len(document) <= LIMIT_BYTES[stage]:
        raise PeerError(f"A {stage} document of {len(document)} bytes; the limit is {LIMIT_BYTES[stage]}.")
    signature, payload = document[:_SIGNATURE_BYTES], document[_SIGNATURE_BYTES:]
    try:
        key.verify(signature, _signed(stage) + payload)
    except InvalidSignature as exc:
        raise TrustError(f"The {stage} is not signed by the cloud this node is enrolled with.") from exc
    return payload


def sign_record(record: msgspec.Struct, key: Ed25519PrivateKey, stage: DownStage) -> bytes:
    """Returns a record's canonical bytes, signed."""
    return sign(encode(record), key, stage)


def verify_record(document: bytes, key: Ed25519PublicKey, stage: DownStage, record: type[_T]) -> _T:
    """Returns a signed document's record; raises as `verify`, and PeerError when it is no such record."""
    return decode(verify(document, key, stage), record)


def _signed(stage: DownStage) -> bytes:
    return b"radfleet " + stage.encode() + b" 1\x00"
