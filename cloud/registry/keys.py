"""Ed25519 keys of the registry as files: PKCS#8 PEM, readable by their owner only."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner

from shared.errors import StateError
from shared.files import atomic_write, read_limited

SNAPSHOT_KEY = "tuf-snapshot.key"
TIMESTAMP_KEY = "tuf-timestamp.key"
DIRECTOR_KEY = "director.key"
KEY_LIMIT_BYTES = 10_000


def create_key(path: Path) -> CryptoSigner:
    """Returns a new signer whose private key is at `path`; an existing key is kept and returned."""
    if path.exists():
        return load_key(path)
    signer = CryptoSigner.generate_ed25519()
    atomic_write(path, signer.private_bytes, mode=0o600)
    return signer


def load_key(path: Path) -> CryptoSigner:
    """Returns the signer whose private key is at `path`.

    Raises:
        StateError: the file is missing or is not an Ed25519 key.
    """
    try:
        key = load_pem_private_key(read_limited(path, KEY_LIMIT_BYTES), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise StateError(f"{path} is not a private key.", cure="Restore it from the backup.") from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise StateError(f"{path} is not an Ed25519 key.", cure="Restore it from the backup.")
    return CryptoSigner(key)


def create_online_keys(keys: Path) -> None:
    """Creates the keys that the cloud itself holds: snapshot, timestamp and director; never root, never release."""
    keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name in (SNAPSHOT_KEY, TIMESTAMP_KEY, DIRECTOR_KEY):
        create_key(keys / name)
