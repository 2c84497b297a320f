"""Every error Radfleet raises, in families by who must act.

    RadfleetError
    ├── PeerError       somebody sent us bad input: refuse it, keep the bytes, show the reason
    ├── LinkError       a network or a server is away: retry with back-off, never lose the work
    ├── TrustError      a signature, digest, name, version or replay check failed: never retry, alarm
    ├── StateError      our own disk or database let us down: stop before promising anything
    │   └── RoomError   there is no room left: refuse new work, keep what is acknowledged
    └── ConfigError     the operator must change a setting: all faults are listed at once

Foreign exceptions are translated once, in the adapter that meets them, with ``from exc``.
Every error carries a one-line cure; each process ends with its family's exit code (sysexits.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class RadfleetError(Exception):
    """Root of the tree: a message that says what is wrong and a cure that says what to do."""

    exit_code: ClassVar[int] = 70  # EX_SOFTWARE

    def __init__(self, message: str, *, cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure

    def __str__(self) -> str:
        return f"{self.message} Cure: {self.cure}" if self.cure else self.message


class PeerError(RadfleetError):
    """A modality, PACS, node or person sent something we cannot accept."""

    exit_code = 65  # EX_DATAERR


class LinkError(RadfleetError):
    """A network peer cannot be reached or answered too late; the work stays queued."""

    exit_code = 69  # EX_UNAVAILABLE


class TrustError(RadfleetError):
    """A proof failed: signature, digest, identity, version, expiry or replay."""

    exit_code = 77  # EX_NOPERM


class StateError(RadfleetError):
    """Our disk or database failed or holds something impossible."""

    exit_code = 74  # EX_IOERR


class RoomError(StateError):
    """A disk, quota or queue is full; nothing was written half."""

    exit_code = 73  # EX_CANTCREAT


class ConfigError(RadfleetError):
    """One or more settings are wrong; `faults` lists all of them as ``file: key: what. cure``."""

    exit_code = 78  # EX_CONFIG

    def __init__(self, message: str, *, faults: Sequence[str] = (), cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.faults = tuple(faults)

    def __str__(self) -> str:
        return "\n  ".join([super().__str__(), *self.faults])
