"""Golden bytes: another implementation, or another version of this one, must read and write exactly these.

Keys are for tests only. After a deliberate change of format (and of its version number):
`python -m tests.shared.wire.test_golden` writes them anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shared.wire.chunks import pack, unpack, whole_of
from shared.wire.envelope import Header, SealPrivate, open_sealed, read_header, seal
from shared.wire.records import Desired, FeatureBatch, FeatureRow, Receipt, ReleaseOrder
from shared.wire.signed import sign_record, verify_record
from shared.wire.stages import STAGES, decode, encode

FOLDER = Path(__file__).parent / "golden"
DEVICE = Ed25519PrivateKey.from_private_bytes(b"radfleet golden device key 00001")
CLOUD = Ed25519PrivateKey.from_private_bytes(b"radfleet golden cloud key 000001")
SEAL = SealPrivate(
    b"radfleet golden ml-kem seed, which has sixty-four bytes 00000001" + b"radfleet golden x25519 key 00001"
)

HEADER = Header(
    version=1,
    site="hosp-a",
    node="edge-1",
    incarnation="0123456789abcdef",
    stage="features",
    id="000102030405060708090a0b0c0d0e0f",
    sequence=42,
    round="",
    key_id=SEAL.public.key_id,
    created=1_767_225_600_000,
)
BATCH = FeatureBatch("ab" * 32, "cpu-u8s8", [FeatureRow("0f" * 16, "chest-xray", 1, False, bytes.fromhex("003c0040"))])
RECEIPT = Receipt(HEADER.id, "partial", "", b"\x05")
DESIRED = Desired("edge-1", "hosp-a", 7, "2026-01-01T00:00:00+00:00", None, ReleaseOrder(3, "cd" * 32), "features")


def golden(name: str) -> bytes:
    return (FOLDER / name).read_bytes()


def written() -> dict[str, bytes]:
    """Returns every file whose bytes have no randomness in them."""
    sealed = golden("sealed.bin")
    keys = {
        "device_private": DEVICE.private_bytes_raw().hex(),
        "device_public": DEVICE.public_key().public_bytes_raw().hex(),
        "cloud_private": CLOUD.private_bytes_raw().hex(),
        "cloud_public": CLOUD.public_key().public_bytes_raw().hex(),
        "seal_private": SEAL.raw.hex(),
        "seal_key_id": SEAL.public.key_id,
    }
    return {
        "keys.json": json.dumps(keys, indent=2).encode(),
        "header.msgpack": msgspec.msgpack.encode(HEADER),
        "record.msgpack": encode(BATCH),
        "chunk.bin": pack(whole_of(HEADER.id, sealed), 0, sealed),
        "receipt.bin": sign_record(RECEIPT, CLOUD, "receipt"),
        "desired.bin": sign_record(DESIRED, CLOUD, "desired"),
    }


def test_the_same_bytes_are_written() -> None:
    for name, data in written().items():
        assert data == golden(name), name


def test_the_sealed_message_opens() -> None:
    sealed = golden("sealed.bin")
    assert read_header(sealed) == HEADER
    header, record = open_sealed(sealed, [SEAL], [DEVICE.public_key()])
    assert (header, decode(record, FeatureBatch)) == (HEADER, BATCH)


def test_the_chunk_is_read() -> None:
    chunk = unpack(golden("chunk.bin"), STAGES["features"].sealed_limit)
    assert (chunk.whole.id, chunk.index, chunk.data) == (HEADER.id, 0, golden("sealed.bin"))


def test_the_documents_verify() -> None:
    assert verify_record(golden("receipt.bin"), CLOUD.public_key(), "receipt", Receipt) == RECEIPT
    assert verify_record(golden("desired.bin"), CLOUD.public_key(), "desired", Desired) == DESIRED


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "sealed.bin").write_bytes(seal(HEADER, encode(BATCH), SEAL.public, DEVICE))
    for file, content in written().items():
        (FOLDER / file).write_bytes(content)
