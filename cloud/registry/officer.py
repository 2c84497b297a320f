"""A release officer: a person with a folder of their own, who re-verifies a proposal and then signs it.

An officer's private keys never come near the cloud: `sign_proposal` runs where the officer's folder is, reads the
proposal folder and leaves one file of signatures in it. The officer trusts nothing that the cloud wrote: the package
is verified byte by byte against its manifest, the gate's verdict must be about that manifest, the list of releases may
only grow by this one, and the release number must rise above everything this officer ever signed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Root, Targets

from cloud.registry.keys import create_key, load_key
from cloud.registry.proposal import (
    PACKAGE,
    SIGNATURES,
    VERDICT_LIMIT_BYTES,
    VERDICT_NAME,
    OfficerSignatures,
    Proposal,
    PublicKeys,
    RoleSignature,
    added,
    check_verdict,
    decode,
    read_payload,
    read_proposal,
)
from cloud.registry.shelf import parse
from shared.errors import StateError, TrustError
from shared.files import atomic_write, read_limited, sha256_hex
from shared.package.manifest import verify_package
from shared.package.release import OFFICER_THRESHOLD, read_note, release_path

ROOT_KEY = "root.key"
RELEASE_KEY = "release.key"
PUBLIC_NAME = "public.json"
MEMORY_NAME = "memory.json"
MEMORY_LIMIT_BYTES = 10_000


class Memory(Struct, frozen=True):
    """What an officer remembers having signed: refusing a second root or an older release rests on it alone."""

    root: str = ""  # SHA-256 of the root payload
    release: int = 0
    package: str = ""
    targets: int = 0  # version of the list of releases
    payload: str = ""  # SHA-256 of that list


Check = Callable[[Proposal, Path, Memory], Memory]


def create_officer(folder: Path, name: str) -> Path:
    """Creates an officer's folder with a root key and a release key (0600) and returns the path of its public.json.

    Raises:
        PeerError: the name is not a plain lower-case word.
        StateError: the folder belongs to an officer of another name.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    public = PublicKeys(
        name=name,
        root=_raw(create_key(folder / ROOT_KEY)),
        release=_raw(create_key(folder / RELEASE_KEY)),
    )
    decode(msgspec.json.encode(public), PublicKeys)  # the name's pattern
    path = folder / PUBLIC_NAME
    if path.exists() and decode(read_limited(path, MEMORY_LIMIT_BYTES), PublicKeys) != public:
        raise StateError(f"{folder} is another officer's.", cure="Give every officer a folder of their own.")
    atomic_write(path, msgspec.json.format(msgspec.json.encode(public), indent=2), mode=0o644)
    return path


def check_proposal(proposal: Proposal, folder: Path, memory: Memory) -> Memory:
    """Re-verifies a proposal and returns what the officer will remember once it is signed.

    Raises:
        TrustError: anything in the proposal is not what it says, or not newer than what was signed before.
        PeerError: a file of the proposal is malformed.
    """
    if proposal.kind == "root":
        return _check_root(proposal, folder, memory)
    return _check_release(proposal, folder, memory)


def sign_proposal(officer: Path, folder: Path, *, check: Check = check_proposal) -> Path:
    """Returns the path of the signature file that the officer with the folder `officer` left in proposal `folder`.

    What is signed is remembered, durably, before the signature exists.

    Raises:
        TrustError: the proposal fails `check`; nothing was signed.
        PeerError: the proposal is malformed.
    """
    public = decode(read_limited(officer / PUBLIC_NAME, MEMORY_LIMIT_BYTES), PublicKeys)
    proposal = read_proposal(folder)
    memory_path = officer / MEMORY_NAME
    memory = Memory()
    if memory_path.exists():
        memory = decode(read_limited(memory_path, MEMORY_LIMIT_BYTES), Memory)
    remembered = check(proposal, folder, memory)
    atomic_write(memory_path, msgspec.json.encode(remembered))
    targets = parse(read_payload(folder, "targets.json"), Targets)
    signatures = [_sign("targets", targets.signed_bytes, load_key(officer / RELEASE_KEY))]
    if proposal.kind == "root":
        root = parse(read_payload(folder, "root.json"), Root)
        signatures.append(_sign("root", root.signed_bytes, load_key(officer / ROOT_KEY)))
    path = folder / SIGNATURES / f"{public.name}.json"
    path.parent.mkdir(exist_ok=True)
    record = OfficerSignatures(officer=public.name, signatures=signatures)
    atomic_write(path, msgspec.json.encode(record), mode=0o644)
    return path


def _check_root(proposal: Proposal, folder: Path, memory: Memory) -> Memory:
    root = parse(read_payload(folder, "root.json"), Root)
    targets = parse(read_payload(folder, "targets.json"), Targets)
    digest = sha256_hex(root.signed_bytes)
    payload = sha256_hex(targets.signed_bytes)
    if memory.root and (memory.root, memory.payload) != (digest, payload):
        raise TrustError("This officer has signed another root.", cure="A fleet has one root of trust.")
    offline = [set(root.signed.roles[role].keyids) for role in ("root", "targets")]
    online = [set(root.signed.roles[role].keyids) for role in ("snapshot", "timestamp")]
    if any(root.signed.roles[role].threshold < OFFICER_THRESHOLD for role in ("root", "targets")):
        raise TrustError(f"Root and release need {OFFICER_THRESHOLD} officers.")
    if root.signed.version != 1 or (offline[0] | offline[1]) & (online[0] | online[1]):
        raise TrustError("The root gives an online key the right of an officer, or is not the first.")
    if targets.signed.version != 1 or targets.signed.delegations is not None:
        raise TrustError("The first list of releases is not the first, or delegates.")
    if proposal.release == 0 and not targets.signed.targets:
        return Memory(root=digest, targets=1, payload=payload)
    path = added(Targets(), targets.signed)
    _check_package(proposal, folder, path, targets.signed, verdict="")
    return Memory(digest, proposal.release, proposal.package, 1, payload)


def _check_release(proposal: Proposal, folder: Path, memory: Memory) -> Memory:
    root = parse(read_payload(folder, "root.json"), Root)
    if sha256_hex(root.signed_bytes) != memory.root:
        raise TrustError("The proposal stands on a root that this officer did not sign.")
    previous = parse(read_payload(folder, "previous.json"), Targets)
    targets = parse(read_payload(folder, "targets.json"), Targets)
    try:
        root.signed.verify_delegate("targets", previous.signed_bytes, previous.signatures)
    except RepositoryError as exc:
        raise TrustError("The releases said to be published were not signed by enough officers.") from exc
    path = added(previous.signed, targets.signed)
    record = read_limited(folder / VERDICT_NAME, VERDICT_LIMIT_BYTES)
    check_verdict(record, proposal.package)
    _check_package(proposal, folder, path, targets.signed, verdict=sha256_hex(record))
    digest = sha256_hex(targets.signed_bytes)
    again = memory.payload == digest  # the same proposal signed twice: the first signature was lost on its way
    published = [read_note(target.custom).release for target in previous.signed.targets.values()]
    if not again and proposal.release <= max([memory.release, *published]):
        raise TrustError(
            f"Release {proposal.release} is not above those signed before.",
            cure="Propose it under a new number.",
        )
    if not again and targets.signed.version <= max(memory.targets, previous.signed.version):
        raise TrustError("The list of releases does not count up.")
    return Memory(memory.root, proposal.release, proposal.package, targets.signed.version, digest)


def _check_package(proposal: Proposal, folder: Path, path: str, targets: Targets, *, verdict: str) -> None:
    manifest = verify_package(folder / PACKAGE, proposal.package)
    target = targets.targets[path]
    note = read_note(target.custom)
    if path != release_path(proposal.release) or manifest.release != proposal.release:
        raise TrustError(f"The package is release {manifest.release}, the proposal says {proposal.release}.")
    if (note.release, note.package, note.verdict) != (proposal.release, proposal.package, verdict):
        raise TrustError("The list of releases names another package or verdict than the proposal.")
    if target.hashes != {"sha256": proposal.package}:
        raise TrustError("The list of releases has another digest than the manifest.")


def _sign(role: Literal["root", "targets"], payload: bytes, signer: CryptoSigner) -> RoleSignature:
    signature = signer.sign(payload)
    return RoleSignature(role=role, keyid=signature.keyid, sig=signature.signature)


def _raw(signer: CryptoSigner) -> str:
    key: SSlibKey = signer.public_key
    return str(key.keyval["public"])
