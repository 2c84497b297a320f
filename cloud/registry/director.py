"""The director: which node shall have which release, signed by one online key and short-lived.

It can choose among the releases that officers published and can do nothing else: a node installs only what both
repositories name. Taking a node out stops an installation that has not begun; going back to an older release needs
`allow_downgrade_to` in the signed assignment.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import msgspec
from msgspec import Struct
from tuf.api.metadata import Metadata, Role, Root, TargetFile, Targets

from cloud.registry.keys import DIRECTOR_KEY, load_key
from cloud.registry.shelf import Shelf, whole
from shared.clock import Clock
from shared.errors import TrustError
from shared.package.release import Assignment, node_path, read_assignment, read_note

ROOT_LIFE = timedelta(days=5 * 365)
TARGETS_LIFE = timedelta(days=1)

NodeName = tuple[str, str]  # site, node


class Named(Struct, frozen=True):
    """What one node shall have; `downgrade` permits that it is older than what the node serves."""

    release: int
    downgrade: bool = False


class Director:
    """Lives in `folder`: `metadata/` is served to nodes as /tuf/director/."""

    def __init__(self, folder: Path, keys: Path, *, clock: Clock) -> None:
        self._signer = load_key(keys / DIRECTOR_KEY)
        self._shelf = Shelf(folder / "metadata", snapshot=self._signer, timestamp=self._signer)
        self._clock = clock

    def create(self) -> bytes:
        """Returns root version 1, which a node pins at enrolment; writes it and an empty list the first time."""
        with self._shelf.lock():
            if not self._shelf.has_root():
                roles = {name: Role([], 1) for name in ("root", "targets", "snapshot", "timestamp")}
                root = Metadata(Root(expires=whole(self._clock.now() + ROOT_LIFE), roles=roles))
                for name in roles:
                    root.signed.add_key(self._signer.public_key, name)
                root.sign(self._signer)
                self._shelf.write_root(root)
            if self._shelf.current() is None:
                self._write({}, version=1)
        return self._shelf.root_bytes()

    def assignments(self) -> dict[NodeName, Assignment]:
        """Returns what the director says now, by (site, node)."""
        current = self._shelf.current()
        found = [] if current is None else [read_assignment(t.custom) for t in current.targets.signed.targets.values()]
        return {(a.site, a.node): a for a in found}

    def assign(self, changes: Mapping[NodeName, Named | None], releases: Mapping[int, TargetFile]) -> None:
        """Names a release for each node in `changes`, or none; other nodes keep what they have.

        Args:
            releases: the published ones, from ReleaseRepository.releases().

        Raises:
            TrustError: a release is not published; nothing was changed.
        """
        with self._shelf.lock():
            current = self._shelf.current()
            before = {} if current is None else dict(current.targets.signed.targets)
            after = dict(before)
            for (site, node), named in changes.items():
                path = node_path(site, node)
                if named is None:
                    after.pop(path, None)
                    continue
                published = releases.get(named.release)
                if published is None:
                    raise TrustError(f"Release {named.release} is not published.", cure="Publish it first.")
                after[path] = _target(site, node, named, published)
            if current is None or after != before:
                self._write(after, version=current.targets.signed.version + 1 if current else 1)

    def refresh(self) -> bool:
        """Signs everything short-lived anew before it expires; call it every few minutes. True when it wrote."""
        now = self._clock.now()
        with self._shelf.lock():
            current = self._shelf.current()
            if current is None:
                return False
            if current.targets.signed.expires - now < TARGETS_LIFE / 2:
                self._write(current.targets.signed.targets, version=current.targets.signed.version + 1)
                return True
            return self._shelf.refresh(now)

    def _write(self, assigned: Mapping[str, TargetFile], *, version: int) -> None:
        now = self._clock.now()
        targets = Metadata(Targets(version=version, expires=whole(now + TARGETS_LIFE), targets=dict(assigned)))
        targets.sign(self._signer)
        self._shelf.write_targets(targets, now)


def _target(site: str, node: str, named: Named, published: TargetFile) -> TargetFile:
    assignment = Assignment(
        site=site,
        node=node,
        release=named.release,
        package=read_note(published.custom).package,
        allow_downgrade_to=named.release if named.downgrade else None,
    )
    return TargetFile(
        published.length, published.hashes, node_path(site, node), {"custom": msgspec.to_builtins(assignment)}
    )
