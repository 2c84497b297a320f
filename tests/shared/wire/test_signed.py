"""Documents from the cloud: one kind never passes for another, and nobody else signs."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.errors import PeerError, TrustError
from shared.wire.records import Desired, Receipt
from shared.wire.signed import LIMIT_BYTES, sign, sign_record, verify, verify_record

CLOUD, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
RECEIPT = Receipt("00" * 16, "accepted", "", b"")


def test_a_record_comes_back() -> None:
    document = sign_record(RECEIPT, CLOUD, "receipt")
    assert verify_record(document, CLOUD.public_key(), "receipt", Receipt) == RECEIPT


def test_attack_another_signer() -> None:
    with pytest.raises(TrustError):
        verify(sign(b"x", OTHER, "receipt"), CLOUD.public_key(), "receipt")


def test_attack_a_receipt_as_desired_state() -> None:
    with pytest.raises(TrustError):
        verify(sign(b"x", CLOUD, "receipt"), CLOUD.public_key(), "desired")


def test_attack_flipped_bits() -> None:
    document = sign_record(RECEIPT, CLOUD, "receipt")
    for at in range(len(document)):
        broken = bytearray(document)
        broken[at] ^= 1
        with pytest.raises(TrustError):
            verify(bytes(broken), CLOUD.public_key(), "receipt")


def test_lengths_are_limited_on_both_sides() -> None:
    with pytest.raises(PeerError):
        sign(bytes(LIMIT_BYTES["receipt"]), CLOUD, "receipt")
    with pytest.raises(PeerError):
        verify(bytes(LIMIT_BYTES["receipt"] + 1), CLOUD.public_key(), "receipt")
    with pytest.raises(PeerError):
        verify(bytes(64), CLOUD.public_key(), "receipt")


def test_a_signed_document_of_another_shape_is_refused() -> None:
    with pytest.raises(PeerError):
        verify_record(sign(b"\x01", CLOUD, "desired"), CLOUD.public_key(), "desired", Desired)
