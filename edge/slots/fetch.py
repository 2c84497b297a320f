"""The uplink's half of an installation: order, agreement of both repositories, download into models/<sha256>/.

Every call of `step` goes on from what the journal says, so a kill costs at most the file that was being downloaded
(and the downloader resumes that one too). Nothing here touches the model that serves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from datetime import datetime, timedelta
from pathlib import Path
from typing import Protocol

from edge.slots.journal import Journal, Slot
from edge.slots.verify import Advanced, Get, Serving, agree, refresh
from shared.errors import PeerError, StateError, TrustError
from shared.files import fsync_folder, read_limited, translate_os_error
from shared.log import get_logger
from shared.package.manifest import (
    MANIFEST_LIMIT_BYTES,
    MANIFEST_NAME,
    Manifest,
    decode_manifest,
    verify_package,
)
from shared.package.release import node_path, release_path
from shared.wire.records import ReleaseOrder

STAGING = ".staging"
RETRY_AFTER = timedelta(seconds=60)  # before an order that was refused for a passing reason is tried again

log = get_logger()


class Download(Protocol):
    """Fetches one blob from the node port."""

    def __call__(self, url_path: str, path: Path, sha256: str, length: int, /) -> None:
        """Writes GET `url_path` to `path`, resuming what is there, fsynced, of this length and digest.

        Raises:
            LinkError: the cloud went away; what came so far is kept.
            TrustError: the bytes are not those named.
            RoomError: the disk is full.
        """


def needed(manifest: Manifest, providers: Collection[str]) -> list[str]:
    """Returns the files of a package that a machine with these execution providers needs to serve it.

    Weights are left out: local training gets them with its task.

    Raises:
        PeerError: no variant runs here.
    """
    variants = [v.file for v in manifest.variants if set(v.providers) & set(providers)]
    if not variants:
        raise PeerError(f"No variant of {manifest.name} runs on {', '.join(sorted(providers))}.")
    return [manifest.golden, manifest.card, *variants]


class Fetcher:
    """Turns a ReleaseOrder into a DOWNLOADED package."""

    def __init__(
        self,
        models: Path,
        journal: Journal,
        *,
        site: str,
        node: str,
        release_root: bytes,
        director_root: bytes,
        get: Get,
        download: Download,
        providers: Collection[str],
        now: Callable[[], datetime],
        nudge: Callable[[], None],
    ) -> None:
        """`models` is the state folder's models/; `now` is the clock raised to the node's time floor."""
        self._models = models
        self._journal = journal
        self._site = site
        self._node = node
        self._roots = {"release": release_root, "director": director_root}
        self._get = get
        self._download = download
        self._providers = providers
        self._now = now
        self._nudge = nudge

    def step(self, order: ReleaseOrder | None) -> bool:
        """Brings the node one step nearer to `order`; True when there may be more to do at once.

        Raises:
            LinkError: the cloud is away; call again later.
            RoomError: the disk is full; the model in place keeps serving.
        """
        if order is None:
            return self._journal.withdraw()
        serving = self._journal.committed()
        if serving is not None and serving[0] == order.package:
            return self._journal.withdraw()
        slot = self._journal.get(order.package)
        if slot is None or slot.state in ("REFUSED", "ROLLED_BACK", "COMMITTED"):
            return self._may_offer(slot) and self._journal.offer(order.package, order.release)
        try:
            if slot.state == "OFFERED":
                self._journal.verified(order.package, self._verify(order))
                return True
            if slot.state == "VERIFIED":
                self._fetch(slot)
                self._journal.advance(slot.package, "DOWNLOADED")
                log.info("slots.downloaded", package=slot.package, release=slot.release)
                self._nudge()
        except (TrustError, PeerError) as exc:
            log.error("slots.refused", package=order.package, release=order.release, reason=exc.message)
            self._journal.refuse(order.package, exc.message, final=False)
            # The downloader takes a file that is there for done: what was refused starts from nothing.
            shutil.rmtree(self._models / STAGING / order.package, ignore_errors=True)
        return False

    def _may_offer(self, slot: Slot | None) -> bool:
        failed = slot is not None and slot.state != "COMMITTED" and slot.attempts > 0
        return slot is None or not failed or abs(self._now() - slot.at) >= RETRY_AFTER

    def _verify(self, order: ReleaseOrder) -> int:
        release = self._refresh("release", release_path(order.release))
        director = self._refresh("director", node_path(self._site, self._node))
        for advanced in (release, director):
            if advanced.error is not None:
                raise advanced.error
        committed = self._journal.committed()
        return agree(
            release.target,
            director.target,
            order,
            site=self._site,
            node=self._node,
            serving=Serving(*committed) if committed else None,
        ).length

    def _refresh(self, repository: str, target: str) -> Advanced:
        trusted = self._journal.trusted(repository)
        advanced = refresh(
            self._roots[repository],
            trusted,
            target,
            base=f"/tuf/{repository}/",
            get=self._get,
            now=self._now(),
        )
        if advanced.files != trusted:
            self._journal.keep_trusted(repository, advanced.files)
        return advanced

    def _fetch(self, slot: Slot) -> None:
        final = self._models / slot.package
        if self._is_whole(final, slot):
            return
        remove_damaged(final)
        staging = self._models / STAGING / slot.package
        for stale in (self._models / STAGING).glob("*"):
            if stale != staging:
                shutil.rmtree(stale, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=True)
        self._download(f"/blobs/{slot.package}", staging / MANIFEST_NAME, slot.package, slot.length)
        manifest = decode_manifest(read_limited(staging / MANIFEST_NAME, MANIFEST_LIMIT_BYTES))
        if manifest.release != slot.release:
            raise TrustError(f"The manifest is of release {manifest.release}, the order says {slot.release}.")
        names = needed(manifest, self._providers)
        for name in names:
            entry = manifest.file(name)
            self._download(f"/blobs/{entry.sha256}", staging / name, entry.sha256, entry.length)
        verify_package(staging, slot.package, names=names)
        try:
            fsync_folder(staging)
            staging.rename(final)
            fsync_folder(self._models)
        except OSError as exc:
            raise translate_os_error(exc, str(final)) from exc

    def _is_whole(self, folder: Path, slot: Slot) -> bool:
        try:
            manifest = decode_manifest(read_limited(folder / MANIFEST_NAME, MANIFEST_LIMIT_BYTES))
            verify_package(folder, slot.package, names=needed(manifest, self._providers))
        except (TrustError, PeerError, StateError):
            return False
        return True


def remove_damaged(folder: Path) -> None:
    """Removes a damaged package whole, if it is there: its name must never stand for anything but its bytes."""
    if folder.exists():
        doomed = folder.with_name(f".damaged-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
