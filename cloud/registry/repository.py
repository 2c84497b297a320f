"""The release repository: which model packages exist, signed by a threshold of officers.

The cloud writes proposals and publishes what officers have signed; it holds the keys of snapshot and timestamp only,
so it can keep a published list fresh and can neither add a release nor change one. Every step may be cut off by a
crash and repeated: a proposal appears by a rename, and what clients see changes with `timestamp.json` alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.signer import Key, SSlibKey
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Role, Root, TargetFile, Targets

from cloud.registry.keys import SNAPSHOT_KEY, TIMESTAMP_KEY, load_key
from cloud.registry.proposal import (
    PACKAGE,
    PROPOSAL_NAME,
    SIGNATURES,
    VERDICT_NAME,
    Proposal,
    PublicKeys,
    added,
    check_verdict,
    decode,
    read_payload,
    read_proposal,
    read_signatures,
)
from cloud.registry.shelf import FILE_LIMIT_BYTES, Shelf, parse, to_bytes, whole
from shared.clock import Clock
from shared.errors import PeerError, StateError, TrustError
from shared.files import atomic_write, fsync_folder, read_limited, sha256_hex
from shared.package.manifest import FILE_LIMIT_BYTES as PACKAGE_FILE_LIMIT_BYTES
from shared.package.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, Manifest, verify_package
from shared.package.release import OFFICER_THRESHOLD, ReleaseNote, read_note, release_path

ROOT_LIFE = timedelta(days=5 * 365)
TARGETS_LIFE = timedelta(days=365)
ROOT_PROPOSAL = "root"

ProposalState = Literal["proposed", "signed", "published"]


class Blobs(Protocol):
    """Where package files become content-addressed blobs that nodes may fetch (cloud.objects.Objects)."""

    def put(self, data: bytes) -> str:
        """Stores `data` durably and returns its SHA-256 in hexadecimal."""


class ReleaseRepository:
    """Lives in `folder`: `metadata/` is served to nodes as /tuf/release/, `proposals/` goes to the officers."""

    def __init__(self, folder: Path, keys: Path, *, blobs: Blobs, clock: Clock) -> None:
        self.proposals = folder / "proposals"
        self._snapshot = load_key(keys / SNAPSHOT_KEY)
        self._timestamp = load_key(keys / TIMESTAMP_KEY)
        self._shelf = Shelf(folder / "metadata", snapshot=self._snapshot, timestamp=self._timestamp)
        self._blobs = blobs
        self._clock = clock

    def root(self) -> bytes:
        """Returns root version 1, which a node pins at enrolment; StateError before it was published."""
        return self._shelf.root_bytes()

    def releases(self) -> dict[int, TargetFile]:
        """Returns the published releases by number."""
        current = self._shelf.current()
        if current is None:
            return {}
        return {read_note(t.custom).release: t for t in current.targets.signed.targets.values()}

    def manifest(self, release: int) -> Manifest:
        """Returns the manifest of a published release.

        Raises:
            StateError: the release is not published, or its proposal folder is gone.
            TrustError: the manifest on disk is not the one that was signed.
        """
        target = self.releases().get(release)
        if target is None:
            raise StateError(f"Release {release} is not published.")
        folders = [f for f in self.proposals.glob("[!.]*/") if read_proposal(f).release == release]
        if not folders:
            raise StateError(f"The proposal of release {release} is gone.", cure="Restore it from the backup.")
        return verify_package(folders[0] / PACKAGE, read_note(target.custom).package, names=[])

    def next_release(self) -> int:
        """Returns the number that the next package's manifest must carry: above all published and all proposed."""
        proposed = [read_proposal(folder).release for folder in self.proposals.glob("[!.]*/")]
        return max([0, *self.releases(), *proposed]) + 1

    def propose_root(self, publics: Sequence[Path], *, founding: tuple[Path, str] | None = None) -> Path:
        """Returns the folder of the proposal that makes `publics` (public.json files) the fleet's officers.

        `founding` is the package folder and manifest digest that ship with the software: the first release, so that
        nodes can be sent back to it.

        Raises:
            PeerError: fewer than two officers, or two with one name or one key.
            TrustError: the founding package is not what its digest says.
        """
        officers = [decode(read_limited(path, FILE_LIMIT_BYTES), PublicKeys) for path in publics]
        distinct = {o.name for o in officers}, {o.root for o in officers}, {o.release for o in officers}
        if len(officers) < OFFICER_THRESHOLD or any(len(group) < len(officers) for group in distinct):
            raise PeerError(f"A root needs at least {OFFICER_THRESHOLD} officers, each with keys of their own.")
        root = self._unsigned_root(officers)
        targets = Targets(version=1, expires=whole(self._clock.now() + TARGETS_LIFE))
        proposal = Proposal(1, "root", 0, "", self._clock.now().isoformat())
        if founding is not None:
            package, digest = founding
            release = verify_package(package, digest).release
            _add(targets, package, ReleaseNote(release=release, package=digest, verdict=""))
            proposal = Proposal(1, "root", release, digest, self._clock.now().isoformat())
        files = {"root.json": to_bytes(Metadata(root)), "targets.json": to_bytes(Metadata(targets))}
        return self._write_proposal(ROOT_PROPOSAL, proposal, files, founding[0] if founding else None)

    def propose_release(self, package: Path, digest: str, release: int, verdict: bytes) -> Path:
        """Returns the folder of the proposal to release the package in folder `package`; twice the same is one.

        Args:
            digest: SHA-256 of the package's manifest.
            release: the number in the manifest; above every published one.
            verdict: the gate's record (cloud.training.gate.Verdict as JSON); its digest is signed with the release.

        Raises:
            TrustError: the package is not what `digest` says, or the verdict is about another or does not pass.
            StateError: there is no root yet.
        """
        check_verdict(verdict, digest)
        if verify_package(package, digest).release != release:
            raise TrustError(f"The package's manifest is not of release {release}.")
        current = self._shelf.current()
        if current is None:
            raise StateError("Nothing is published yet.", cure="Publish the root first.")
        standing = self._standing(f"release-{release}", ("release", release, digest))
        if standing is not None:
            return standing
        if release <= max(self.releases(), default=0):
            raise TrustError(f"Release {release} is not above those published.")
        targets = Targets(
            version=self._next_version(current.targets.signed.version),
            expires=whole(self._clock.now() + TARGETS_LIFE),
            targets=dict(current.targets.signed.targets),
        )
        _add(targets, package, ReleaseNote(release=release, package=digest, verdict=sha256_hex(verdict)))
        files = {
            "root.json": self.root(),
            "previous.json": to_bytes(current.targets),
            "targets.json": to_bytes(Metadata(targets)),
            VERDICT_NAME: verdict,
        }
        proposal = Proposal(1, "release", release, digest, self._clock.now().isoformat())
        return self._write_proposal(f"release-{release}", proposal, files, package)

    def state(self, folder: Path) -> ProposalState:
        """Returns how far the proposal in `folder` has come."""
        proposal = read_proposal(folder)
        if self._is_published(proposal):
            return "published"
        try:
            self._signed(folder, proposal)
        except TrustError:
            return "proposed"
        return "signed"

    def publish(self, folder: Path) -> Proposal:
        """Makes a proposal that enough officers have signed visible to nodes; repeating it changes nothing.

        Raises:
            TrustError: too few valid signatures, or the proposal no longer follows on what is published.
        """
        proposal = read_proposal(folder)
        with self._shelf.lock():
            if self._is_published(proposal):
                return proposal
            root, targets = self._signed(folder, proposal)
            current = self._shelf.current()
            if current is not None:
                added(current.targets.signed, targets.signed)
                if targets.signed.version <= current.targets.signed.version:
                    raise TrustError("The proposal is older than what is published.")
            if proposal.package:
                self._store_package(folder / PACKAGE, proposal.package)
            if not self._shelf.has_root():
                self._shelf.write_root(root)
            self._shelf.write_targets(targets, self._clock.now())
        return proposal

    def refresh(self) -> bool:
        """Signs snapshot and timestamp anew before they expire; call it every few minutes. True when it wrote."""
        with self._shelf.lock():
            return self._shelf.refresh(self._clock.now())

    def _is_published(self, proposal: Proposal) -> bool:
        if proposal.kind == "root":
            return self._shelf.current() is not None
        target = self.releases().get(proposal.release)
        return target is not None and read_note(target.custom).package == proposal.package

    def _signed(self, folder: Path, proposal: Proposal) -> tuple[Metadata[Root], Metadata[Targets]]:
        targets = parse(read_payload(folder, "targets.json"), Targets)
        targets.signatures.update(read_signatures(folder, "targets"))
        if self._shelf.has_root():
            root = self._shelf.root()
        elif proposal.kind == "root":
            root = parse(read_payload(folder, "root.json"), Root)
            root.signatures.update(read_signatures(folder, "root"))
        else:
            raise StateError("The release repository has no root yet.", cure="Publish the root first.")
        try:
            root.signed.verify_delegate("root", root.signed_bytes, root.signatures)
            root.signed.verify_delegate("targets", targets.signed_bytes, targets.signatures)
        except RepositoryError as exc:
            raise TrustError(
                f"The proposal {folder.name} is not signed by enough officers: {exc}.",
                cure="radfleet-cloud release sign",
            ) from exc
        return root, targets

    def _unsigned_root(self, officers: Sequence[PublicKeys]) -> Root:
        root = Root(expires=whole(self._clock.now() + ROOT_LIFE), roles=_roles(OFFICER_THRESHOLD))
        for officer in officers:
            root.add_key(_key(officer.root), "root")
            root.add_key(_key(officer.release), "targets")
        root.add_key(self._snapshot.public_key, "snapshot")
        root.add_key(self._timestamp.public_key, "timestamp")
        return root

    def _next_version(self, published: int) -> int:
        # Above abandoned proposals too: an officer never signs two lists with one version.
        versions = [
            parse(read_payload(folder, "targets.json"), Targets).signed.version
            for folder in self.proposals.glob("[!.]*/")
        ]
        return max([published, *versions]) + 1

    def _write_proposal(self, name: str, proposal: Proposal, files: dict[str, bytes], package: Path | None) -> Path:
        standing = self._standing(name, _subject(proposal))
        if standing is not None:
            return standing
        staging = self.proposals / f".{name}"
        shutil.rmtree(staging, ignore_errors=True)
        (staging / SIGNATURES).mkdir(parents=True)
        if package is not None:
            (staging / PACKAGE).mkdir()
            for entry in [MANIFEST_NAME, *(f.name for f in verify_package(package, proposal.package).files)]:
                data = read_limited(package / entry, PACKAGE_FILE_LIMIT_BYTES)
                atomic_write(staging / PACKAGE / entry, data, mode=0o644)
        for file, data in files.items():
            atomic_write(staging / file, data, mode=0o644)
        atomic_write(staging / PROPOSAL_NAME, msgspec.json.encode(proposal), mode=0o644)
        folder = staging.rename(self.proposals / name)
        fsync_folder(self.proposals)
        return folder

    def _standing(self, name: str, subject: tuple[str, int, str]) -> Path | None:
        folder = self.proposals / name
        if not folder.exists():
            return None
        if _subject(read_proposal(folder)) != subject:
            raise TrustError(f"Another package is already proposed as {name}.", cure="Count the release up.")
        return folder

    def _store_package(self, folder: Path, digest: str) -> None:
        manifest = verify_package(folder, digest)
        self._blobs.put(read_limited(folder / MANIFEST_NAME, MANIFEST_LIMIT_BYTES))
        for entry in manifest.files:
            self._blobs.put(read_limited(folder / entry.name, PACKAGE_FILE_LIMIT_BYTES))


def _roles(threshold: int) -> dict[str, Role]:
    return {
        "root": Role([], threshold),
        "targets": Role([], threshold),
        "snapshot": Role([], 1),
        "timestamp": Role([], 1),
    }


def _key(public: str) -> Key:
    try:
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    except ValueError as exc:
        raise PeerError("An officer's public key is not an Ed25519 key.") from exc


def _add(targets: Targets, package: Path, note: ReleaseNote) -> None:
    path = release_path(note.release)
    manifest = read_limited(package / MANIFEST_NAME, MANIFEST_LIMIT_BYTES)
    target = TargetFile.from_data(path, manifest, ["sha256"])
    target.unrecognized_fields["custom"] = msgspec.to_builtins(note)
    targets.targets[path] = target


def _subject(proposal: Proposal) -> tuple[str, int, str]:
    return proposal.kind, proposal.release, proposal.package
