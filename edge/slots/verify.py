"""Is this release meant for this node? Trusted state, what the cloud serves, and the time go in; the answer comes out.

The engine is python-tuf's `Updater`: it runs in a temporary folder made from the trusted state that the caller keeps
(durably, in one transaction), because it writes its own cache without fsync. Its downloader of targets, which writes
in place, is never used. Expiry is judged twice: by the Updater with the machine's clock, and here with `now`, which
the caller has raised to its time floor, so that a clock set back to 1970 does not make old metadata fresh.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from tuf.api.exceptions import DownloadError, DownloadHTTPError, DownloadLengthMismatchError, RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from shared.errors import LinkError, RadfleetError, StateError, TrustError
from shared.package.release import Assignment, read_assignment, read_note
from shared.wire.records import ReleaseOrder

METADATA_LIMIT_BYTES = 5_000_000
CONFIG = UpdaterConfig(max_root_rotations=32, max_delegations=0, targets_max_length=METADATA_LIMIT_BYTES)
_CURE = "Check the cloud's release repository and this node's clock; the model in place keeps serving."


class Get(Protocol):
    """Fetches one small file from the node port."""

    def __call__(self, path: str, max_length: int, /) -> bytes | None:
        """Returns the body of GET `path`, or None when the cloud has no such file.

        Raises:
            LinkError: the cloud cannot be reached.
            TrustError: the body is longer than `max_length` bytes.
        """


@dataclass(frozen=True)
class Advanced:
    """What to trust from now on, even when `error` ends the attempt, and the target asked for."""

    files: Mapping[str, bytes]
    target: TargetFile | None
    error: TrustError | None


@dataclass(frozen=True)
class Serving:
    """What the node has committed: the measure for going up or down."""

    package: str
    release: int


def refresh(
    bootstrap: bytes, trusted: Mapping[str, bytes], target: str, *, base: str, get: Get, now: datetime
) -> Advanced:
    """Runs the TUF client workflow once and looks `target` up.

    Args:
        bootstrap: root version 1, pinned at enrolment.
        trusted: the files of the last `Advanced`; empty the first time.
        target: target path.
        base: where the repository lies on the node port, e.g. `/tuf/release/`.
        now: the time, not below the node's time floor.

    Raises:
        LinkError: the cloud cannot be reached or has not published anything; the trusted state stands.
    """
    with tempfile.TemporaryDirectory(prefix="radfleet-tuf-") as name:
        folder = Path(name)
        _lay_out(folder, trusted)
        found, error = None, None
        try:
            updater = Updater(str(folder), base, fetcher=_Fetcher(get), config=CONFIG, bootstrap=bootstrap)
            updater.refresh()
            _check_expiry(folder, now)
            found = updater.get_targetinfo(target)
        except DownloadLengthMismatchError as exc:
            error = TrustError(f"Metadata under {base} is longer than allowed: {exc}.")
        except DownloadError as exc:
            if isinstance(exc.__cause__, TrustError):
                error = exc.__cause__
            elif isinstance(exc.__cause__, RadfleetError):
                raise exc.__cause__ from exc
            else:
                raise LinkError(f"Metadata under {base} cannot be fetched: {exc}.") from exc
        except RepositoryError as exc:
            error = TrustError(f"Metadata under {base} is not to be trusted: {exc}.", cure=_CURE)
        except TrustError as exc:
            error = exc
        except OSError as exc:
            raise StateError(f"Cannot verify metadata in {folder}: {exc}.") from exc
        return Advanced(_collect(folder), None if error else found, error)


def agree(
    release: TargetFile | None,
    director: TargetFile | None,
    order: ReleaseOrder,
    *,
    site: str,
    node: str,
    serving: Serving | None,
) -> TargetFile:
    """Returns the manifest's target when officers, director and order all mean this package for this node.

    Raises:
        TrustError: they do not, or it would go back to an older release without signed permission.
    """
    if release is None:
        raise TrustError(f"Release {order.release} is not among those the officers signed.")
    if director is None:
        raise TrustError(f"The director names no release for {site}/{node}.")
    note = read_note(release.custom)
    assignment = read_assignment(director.custom)
    if (assignment.site, assignment.node) != (site, node):
        raise TrustError(f"The director's assignment is for {assignment.site}/{assignment.node}, not this node.")
    if (director.hashes, director.length) != (release.hashes, release.length):
        raise TrustError("The director names another manifest than the officers signed.")
    named = {
        (note.release, note.package),
        (assignment.release, assignment.package),
        (order.release, order.package),
    }
    if len(named) != 1 or release.hashes.get("sha256") != order.package:
        raise TrustError("Officers, director and order do not name one and the same release.")
    _check_direction(assignment, serving)
    return release


def _check_direction(assignment: Assignment, serving: Serving | None) -> None:
    if serving is None or assignment.release > serving.release:
        return
    if assignment.release == serving.release:
        raise TrustError(f"Release {assignment.release} serves already, as another package.")
    if assignment.allow_downgrade_to != assignment.release:
        raise TrustError(
            f"Release {assignment.release} is older than {serving.release}, which serves.",
            cure="Roll back from the fleet page, which signs the permission.",
        )


def _check_expiry(folder: Path, now: datetime) -> None:
    for kind in (Root, Timestamp, Snapshot, Targets):
        signed = Metadata.from_file(str(folder / f"{kind.type}.json")).signed
        if signed.is_expired(now):
            raise TrustError(f"The metadata {kind.type} expired at {signed.expires.isoformat()}.", cure=_CURE)


def _lay_out(folder: Path, files: Mapping[str, bytes]) -> None:
    (folder / "root_history").mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _collect(folder: Path) -> dict[str, bytes]:
    paths = [*folder.glob("*.json"), *(folder / "root_history").glob("*.json")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if not p.is_symlink()}


class _Fetcher(FetcherInterface):
    def __init__(self, get: Get) -> None:
        self._get = get

    def _fetch(self, url: str) -> Iterator[bytes]:
        data = self._get(url, METADATA_LIMIT_BYTES)
        if data is None:
            raise DownloadHTTPError(f"{url} is not there", 404)
        return iter([data])
