"""From a passing verdict to a proposal that release officers can read and sign."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from cloud.objects import Objects
from cloud.training.gate import Verdict
from cloud.training.packages import fetch_package
from shared.package.manifest import MANIFEST_NAME, decode_manifest


class Releases(Protocol):
    """Where proposals are made (cloud.registry.repository.ReleaseRepository)."""

    def propose_release(self, package: Path, digest: str, release: int, verdict: bytes) -> Path:
        """Returns the proposal's folder; the same package twice is one proposal."""


def propose(releases: Releases, objects: Objects, work: Path, verdict: Verdict) -> Path:
    """Returns the folder of the proposal to release what the verdict passed; the same verdict twice is one.

    Raises:
        TrustError: the verdict does not pass the package, or the package is not what its digest says.
        StateError: the object store does not hold the package.
    """
    folder = fetch_package(objects, verdict.candidate, work / "packages")
    release = decode_manifest((folder / MANIFEST_NAME).read_bytes()).release
    return releases.propose_release(folder, verdict.candidate, release, msgspec.json.encode(verdict))
