"""What the release repository and the director say about a package, in words both sides read.

Two TUF repositories must agree before a node installs (as in Uptane). The *release* repository, signed by a threshold
of officers, says which manifests exist. The *director*, one online key, says which of them one node shall have.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from shared.errors import TrustError
from shared.package.manifest import Sha256

OFFICER_THRESHOLD = 2
ReleaseNumber = Annotated[int, Meta(ge=1, le=2**31)]


class ReleaseNote(Struct, frozen=True, forbid_unknown_fields=True):
    """`custom` of a target in the release repository. `verdict` is the SHA-256 of the gate's record, empty for the
    founding release, which is the package that ships with the software and that no gate compared with anything."""

    release: ReleaseNumber
    package: Sha256
    verdict: Annotated[str, Meta(pattern="^([0-9a-f]{64})?$")]


class Assignment(Struct, frozen=True, forbid_unknown_fields=True):
    """`custom` of a target in the director: one node, one release.

    A node refuses a release below the one it serves unless `allow_downgrade_to` names exactly that release.
    """

    site: str
    node: str
    release: ReleaseNumber
    package: Sha256
    allow_downgrade_to: ReleaseNumber | None = None


def release_path(release: int) -> str:
    """Returns the target path of a release's manifest in the release repository."""
    return f"releases/{release}/manifest.json"


def node_path(site: str, node: str) -> str:
    """Returns the target path under which the director names one node's manifest."""
    return f"nodes/{site}/{node}/manifest.json"


def read_note(custom: Any) -> ReleaseNote:
    """Returns the release target's `custom`; TrustError when it is not one."""
    try:
        return msgspec.convert(custom, ReleaseNote)
    except msgspec.ValidationError as exc:
        raise TrustError(f"The release target's note is malformed: {exc}.") from exc


def read_assignment(custom: Any) -> Assignment:
    """Returns the director target's `custom`; TrustError when it is not one."""
    try:
        return msgspec.convert(custom, Assignment)
    except msgspec.ValidationError as exc:
        raise TrustError(f"The director's assignment is malformed: {exc}.") from exc
