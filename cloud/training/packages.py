"""Packages in the object store: a package's digest names its manifest, the manifest names the rest."""

from __future__ import annotations

from pathlib import Path

from cloud.objects import Objects
from shared.errors import StateError
from shared.files import atomic_write, read_limited
from shared.package.manifest import (
    FILE_LIMIT_BYTES,
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    Manifest,
    decode_manifest,
    verify_package,
)


def store_package(objects: Objects, folder: Path, digest: str) -> Manifest:
    """Puts every file of the package in `folder` into the store, the manifest last, and returns its manifest.

    Raises:
        TrustError: the folder is not the package `digest`.
    """
    manifest = verify_package(folder, digest)
    for entry in manifest.files:
        objects.put(read_limited(folder / entry.name, FILE_LIMIT_BYTES))
    objects.put(read_limited(folder / MANIFEST_NAME, MANIFEST_LIMIT_BYTES))
    return manifest


def fetch_package(objects: Objects, digest: str, folder: Path) -> Path:
    """Returns `folder/<digest>` holding the package; files that are there already are checked, not fetched.

    Raises:
        StateError: the store does not hold it.
        TrustError: what the store holds is not the package `digest`.
    """
    if objects.length(digest) > MANIFEST_LIMIT_BYTES:
        raise StateError(f"Object {digest[:12]} is no manifest.")
    home = folder / digest
    home.mkdir(parents=True, exist_ok=True)
    data = objects.read(digest)
    for entry in decode_manifest(data).files:
        if not (home / entry.name).is_file():
            atomic_write(home / entry.name, objects.read(entry.sha256), mode=0o644)
    atomic_write(home / MANIFEST_NAME, data, mode=0o644)
    verify_package(home, digest)
    return home
