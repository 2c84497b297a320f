"""A proposal: a folder that the cloud writes, officers read and sign, and the cloud publishes.

    proposal.json        what is proposed (Proposal)
    root.json            kind root: the unsigned root; kind release: the published root
    targets.json         the unsigned list of releases as it shall become
    previous.json        kind release: the published list of releases that it replaces
    package/             the package folder, so that an officer judges what nodes will get
    verdict.json         kind release: the gate's record
    signatures/<name>.json   one file an officer

The folder may travel by any means: nothing in it is trusted before it is checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct
from securesystemslib.signer import Signature
from tuf.api.metadata import Targets

from cloud.registry.shelf import FILE_LIMIT_BYTES
from cloud.training.gate import Verdict
from shared.errors import PeerError, TrustError
from shared.files import read_limited

PROPOSAL_NAME = "proposal.json"
PACKAGE = "package"
VERDICT_NAME = "verdict.json"
VERDICT_LIMIT_BYTES = 1_000_000
SIGNATURES = "signatures"
PASSING = (
    "pass",
    "weak",
)  # `insufficient` and `fail` are never released; `weak` is a gate that saw phantoms only

OfficerName = Annotated[str, Meta(pattern="^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
Hex = Annotated[str, Meta(pattern="^[0-9a-f]+$", max_length=10_000)]
T = TypeVar("T", bound=Struct)


class Proposal(Struct, frozen=True, forbid_unknown_fields=True):
    """What is proposed. `release` and `package` are 0 and empty for a root without a founding release."""

    format: Literal[1]
    kind: Literal["root", "release"]
    release: int
    package: str
    created: str


class PublicKeys(Struct, frozen=True):
    """An officer's public.json: raw Ed25519 public keys in hexadecimal."""

    name: OfficerName
    root: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    release: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class RoleSignature(Struct, frozen=True):
    """One signature over one role's canonical payload."""

    role: Literal["root", "targets"]
    keyid: Hex
    sig: Hex


class OfficerSignatures(Struct, frozen=True):
    """The file that an officer leaves in `signatures/`."""

    officer: OfficerName
    signatures: Annotated[list[RoleSignature], Meta(max_length=2)]


def decode(data: bytes, kind: type[T]) -> T:
    """Returns the record in `data`; PeerError when it is not one of `kind`."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as exc:
        raise PeerError(f"Not a {kind.__name__}: {exc}.") from exc


def read_proposal(folder: Path) -> Proposal:
    """Returns `folder`'s proposal.json; PeerError when it is not one."""
    return decode(read_limited(folder / PROPOSAL_NAME, FILE_LIMIT_BYTES), Proposal)


def read_payload(folder: Path, name: str) -> bytes:
    """Returns the bytes of one of the proposal's metadata files."""
    return read_limited(folder / name, FILE_LIMIT_BYTES)


def check_verdict(record: bytes, package: str) -> Verdict:
    """Returns the gate's verdict in `record`.

    Raises:
        PeerError: `record` is no verdict.
        TrustError: it judged another package, or did not pass it.
    """
    verdict = decode(record, Verdict)
    if verdict.candidate != package:
        raise TrustError(f"The verdict judged {verdict.candidate[:12]}, not {package[:12]}.")
    if verdict.decision != "pass":
        raise TrustError(f"The gate said {verdict.decision!r} of {package[:12]}.", cure="Only what passed is released.")
    return verdict


def read_signatures(folder: Path, role: Literal["root", "targets"]) -> dict[str, Signature]:
    """Returns every signature for `role` that lies in the proposal, by key id. Checks none of them."""
    found: dict[str, Signature] = {}
    for path in sorted((folder / SIGNATURES).glob("*.json")):
        for entry in decode(read_limited(path, FILE_LIMIT_BYTES), OfficerSignatures).signatures:
            if entry.role == role:
                found[entry.keyid] = Signature(entry.keyid, entry.sig)
    return found


def added(previous: Targets, proposed: Targets) -> str:
    """Returns the one target path that `proposed` adds.

    Raises:
        TrustError: `proposed` adds none or several, or changes or drops a published one, or delegates.
    """
    new = proposed.targets.keys() - previous.targets.keys()
    kept = all(proposed.targets.get(path) == target for path, target in previous.targets.items())
    if len(new) != 1 or not kept or proposed.delegations is not None or previous.delegations is not None:
        raise TrustError("The proposal does more than add one release to those published.")
    return new.pop()
