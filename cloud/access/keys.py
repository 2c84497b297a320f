"""The cloud's own two keys: one signs receipts and desired states, the other opens what nodes seal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shared.errors import PeerError, StateError
from shared.files import atomic_write, read_limited
from shared.wire.envelope import SealPrivate

SIGN_KEY, SEAL_KEY = "sign.key", "seal.key"
KEY_LIMIT_BYTES = 10_000


@dataclass(frozen=True, repr=False)
class CloudKeys:
    """`sign` is Ed25519 (PKCS #8 PEM in `sign.key`), `seal` HPKE (96 raw bytes in `seal.key`)."""

    sign: Ed25519PrivateKey
    seal: SealPrivate


def ensure_keys(folder: Path) -> None:
    """Writes the two keys into `folder` (0600) where they are missing; never replaces one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (folder / SIGN_KEY).exists():
        pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        atomic_write(folder / SIGN_KEY, pem, mode=0o600)
    if not (folder / SEAL_KEY).exists():
        atomic_write(folder / SEAL_KEY, SealPrivate.generate().raw, mode=0o600)


def load_keys(folder: Path) -> CloudKeys:
    """Returns the cloud's keys; StateError when one is missing or is not what its name says."""
    try:
        sign = load_pem_private_key(read_limited(folder / SIGN_KEY, KEY_LIMIT_BYTES), None)
        seal = SealPrivate(read_limited(folder / SEAL_KEY, KEY_LIMIT_BYTES))
    except (ValueError, PeerError) as exc:
        raise StateError(f"The keys in {folder} cannot be read: {exc}.", cure="Restore a backup.") from exc
    if not isinstance(sign, Ed25519PrivateKey):
        raise StateError(f"{folder / SIGN_KEY} is not an Ed25519 key.", cure="Restore a backup.")
    return CloudKeys(sign, seal)
