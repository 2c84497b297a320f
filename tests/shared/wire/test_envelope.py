"""The sealed message: what goes in comes out, and nothing else comes out."""

from __future__ import annotations

import os
import struct
import tracemalloc

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PeerError, TrustError
from shared.wire import envelope
from shared.wire.envelope import (
    HEADER_LIMIT_BYTES,
    Header,
    SealPrivate,
    SealPublic,
    open_sealed,
    read_header,
    seal,
)
from shared.wire.stages import KIB, STAGES

OURS, OTHERS = SealPrivate.generate(), SealPrivate.generate()
DEVICE, FORGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def header(stage: str = "update", **changes: object) -> Header:
    values = {
        "version": 1, "site": "hosp-a", "node": "n1", "incarnation": "i1", "stage": stage, "id": "0f" * 16,
        "sequence": 7, "round": "r1", "key_id": OURS.public.key_id, "created": 1_700_000_000_000,
    }  # fmt: skip
    return Header(**{**values, **changes})


def sign(unsigned: bytes, key: Ed25519PrivateKey = DEVICE) -> bytes:
    """Signs anything as a device would: for messages that an honest sealer never makes."""
    return unsigned + key.sign(b"radfleet envelope 1\x00" + unsigned)


def assemble(named: bytes, body: bytes) -> bytes:
    return b"RFE1" + struct.pack(">H", len(named)) + named + struct.pack(">I", len(body)) + body


def sealed_with(packed: bytes, head: Header | None = None) -> bytes:
    """Seals bytes that are not what a sealer would have compressed."""
    named = msgspec.msgpack.encode(head or header())
    return sign(assemble(named, envelope._SUITE.encrypt(packed, OURS.public.key, info=named)))


def opened(sealed: bytes) -> tuple[Header, bytes]:
    return open_sealed(sealed, [OURS], [DEVICE.public_key()])


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=5000))
def test_what_goes_in_comes_out(record: bytes) -> None:
    assert opened(seal(header(), record, OURS.public, DEVICE)) == (header(), record)


def test_overhead_is_what_the_document_says() -> None:
    record = os.urandom(100_000)
    head = len(msgspec.msgpack.encode(header()))
    overhead = len(seal(header(), record, OURS.public, DEVICE)) - len(record)
    assert overhead - head <= 74 + 1136 + 20  # frame and signature, HPKE, zstandard's own


def test_keys_survive_their_bytes() -> None:
    again = SealPrivate(OURS.raw)
    assert again.public.raw == OURS.public.raw
    sealed = seal(header(), b"x", SealPublic(OURS.public.raw), DEVICE)
    assert open_sealed(sealed, [again], [DEVICE.public_key()])[1] == b"x"
    with pytest.raises(PeerError):
        SealPublic(OURS.public.raw[:-1])
    with pytest.raises(PeerError):
        SealPrivate(OURS.raw + b"\x00")


def test_the_observer_sees_each_plaintext_before_sealing_and_after_opening() -> None:
    seen: list[tuple[Header, bytes]] = []
    watch = lambda head, record: seen.append((head, record))  # noqa: E731
    sealed = seal(header(), b"plain", OURS.public, DEVICE, observe=watch)
    open_sealed(sealed, [OURS], [DEVICE.public_key()], observe=watch)
    assert seen == [(header(), b"plain")] * 2


class TestAttackForgery:
    def test_forged_signature(self) -> None:
        sealed = seal(header(), b"x", OURS.public, FORGER)
        with pytest.raises(TrustError, match="signature"):
            opened(sealed)

    def test_no_device_at_all(self) -> None:
        with pytest.raises(TrustError, match="signature"):
            open_sealed(seal(header(), b"x", OURS.public, DEVICE), [OURS], [])

    def test_every_flipped_bit_is_noticed(self) -> None:
        sealed = seal(header(), b"some record", OURS.public, DEVICE)
        for at in range(0, len(sealed), 7):
            broken = bytearray(sealed)
            broken[at] ^= 0x10
            with pytest.raises((PeerError, TrustError)):
                opened(bytes(broken))

    def test_header_swapped_under_a_good_signature(self) -> None:
        """The device itself re-labels a body: HPKE's info still holds the first header."""
        sealed = seal(header(), b"x", OURS.public, DEVICE)
        named = msgspec.msgpack.encode(header())
        body = sealed[6 + len(named) + 4 : -64]
        other = msgspec.msgpack.encode(header(sequence=8))
        with pytest.raises(TrustError, match="does not open"):
            opened(sign(assemble(other, body)))

    def test_sealed_to_somebody_else(self) -> None:
        sealed = seal(header(key_id=OTHERS.public.key_id), b"x", OTHERS.public, DEVICE)
        with pytest.raises(TrustError, match="not ours"):
            opened(sealed)
        lying = seal(header(), b"x", OTHERS.public, DEVICE)  # says it is for us
        with pytest.raises(TrustError, match="does not open"):
            opened(lying)


class TestAttackLimits:
    def test_zstd_bomb(self) -> None:
        limit = STAGES["update"].plain_limit
        bomb = zstandard.ZstdCompressor().compress(bytes(limit + 1))
        assert len(bomb) < 10 * KIB
        sealed = sealed_with(bomb)
        tracemalloc.start()
        with pytest.raises(PeerError, match="decompressed"):
            opened(sealed)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * 1024 * KIB

    def test_zstd_frame_that_hides_its_size(self) -> None:
        compressor = zstandard.ZstdCompressor(write_content_size=False)
        with pytest.raises(PeerError, match="unknown"):
            opened(sealed_with(compressor.compress(b"x" * 1000)))

    def test_zstd_frame_that_lies_about_its_size(self) -> None:
        frame = bytearray(zstandard.ZstdCompressor(write_checksum=False).compress(b"x" * 200))
        at = frame.index(200)
        frame[at] = 100
        with pytest.raises(PeerError, match="frame"):
            opened(sealed_with(bytes(frame)))

    def test_bytes_after_the_frame(self) -> None:
        frame = zstandard.ZstdCompressor().compress(b"x")
        with pytest.raises(PeerError, match="frame"):
            opened(sealed_with(frame + frame))

    def test_not_zstandard(self) -> None:
        with pytest.raises(PeerError, match="frame"):
            opened(sealed_with(b"plain"))

    @pytest.mark.parametrize("claim", [0, 1, 2**20, 2**32 - 1])
    def test_body_length_claims(self, claim: int) -> None:
        named = msgspec.msgpack.encode(header())
        unsigned = b"RFE1" + struct.pack(">H", len(named)) + named + struct.pack(">I", claim) + b"body"
        with pytest.raises(PeerError):
            opened(sign(unsigned))

    def test_header_length_claims(self) -> None:
        for claim in (HEADER_LIMIT_BYTES + 1, 0xFFFF, 300):
            with pytest.raises(PeerError):
                read_header(b"RFE1" + struct.pack(">H", claim) + b"\x00" * 100)

    @pytest.mark.parametrize("length", [0, 1, 5, 6, 50, 200, 1000, -1])
    def test_truncated(self, length: int) -> None:
        with pytest.raises((PeerError, TrustError)):
            opened(seal(header(), b"x" * 500, OURS.public, DEVICE)[:length])

    def test_a_record_over_its_limit_is_not_sealed(self) -> None:
        with pytest.raises(PeerError, match="limit"):
            seal(header("report"), bytes(STAGES["report"].plain_limit + 1), OURS.public, DEVICE)
        with pytest.raises(PeerError, match="sealed report"):
            seal(header("report"), os.urandom(100 * KIB), OURS.public, DEVICE)


class TestAttackHeaderForm:
    @pytest.mark.parametrize(
        "changes",
        [
            {"version": 2},
            {"site": "HOSP"},
            {"node": "a/b"},
            {"stage": "receipt"},
            {"id": "0F" * 16},
            {"sequence": 0},
            {"sequence": 2**60},
            {"round": "../../x"},
            {"key_id": ""},
            {"created": -1},
            {"incarnation": ""},
        ],
    )
    def test_fields_out_of_range(self, changes: dict[str, object]) -> None:
        with pytest.raises(PeerError, match="malformed"):
            opened(sealed_with(b"", header(**changes)))

    def test_not_canonical(self) -> None:
        """7 written in nine bytes where one is enough: the same meaning, another message, so refused."""
        named = msgspec.msgpack.encode(header())
        at = named.index(b"\x07\xa2r1")
        loose = named[:at] + b"\xcf" + struct.pack(">Q", 7) + named[at + 1 :]
        assert msgspec.msgpack.decode(loose, type=Header) == header()
        with pytest.raises(PeerError, match="canonical"):
            opened(sign(assemble(loose, b"")))

    def test_unknown_fields(self) -> None:
        more = msgspec.msgpack.encode([*msgspec.to_builtins(header()), "more"])
        with pytest.raises(PeerError):
            opened(sign(assemble(more, b"")))
