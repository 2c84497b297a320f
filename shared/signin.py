"""How people prove who they are, on both sides: passwords, one-time tokens, CSRF marks, and patience with guessers.

Only digests of tokens are ever stored, so reading a database lets nobody in.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import secrets
from collections import defaultdict
from typing import Literal

import argon2

from shared.clock import Clock
from shared.errors import PeerError

Role = Literal["administrator", "engineer", "radiologist", "auditor"]
ROLES: tuple[Role, ...] = ("administrator", "engineer", "radiologist", "auditor")

PASSWORD_MIN_LENGTH = 12
PASSWORD_MAX_LENGTH = 200  # a longer one would only buy hashing time
LINK_LIFETIME_S = 24 * 3600
SESSION_LIFETIME_S = 12 * 3600
FAILURES_ALLOWED = 5
FAILURE_WINDOW_S = 300.0

_HASHER = argon2.PasswordHasher()


def mint() -> str:
    """Returns a new secret of 256 bits in URL-safe letters."""
    return secrets.token_urlsafe(32)


def token_digest(token: str) -> str:
    """Returns what a store keeps of a token: its SHA-256 in hexadecimal."""
    return hashlib.sha256(token.encode()).hexdigest()


def csrf_mark(session: str) -> str:
    """Returns the mark that a page's forms carry back: bound to the session, useless for opening one."""
    return hmac.new(session.encode(), b"radfleet csrf", hashlib.sha256).hexdigest()


def csrf_matches(session: str, mark: str) -> bool:
    """Tells whether `mark` came from a page of this session."""
    return hmac.compare_digest(csrf_mark(session), mark)


def hash_password(password: str) -> str:
    """Returns the argon2id hash of a new password.

    Raises:
        PeerError: it is shorter than PASSWORD_MIN_LENGTH or longer than PASSWORD_MAX_LENGTH characters.
    """
    if not PASSWORD_MIN_LENGTH <= len(password) <= PASSWORD_MAX_LENGTH:
        raise PeerError(
            f"A password has {PASSWORD_MIN_LENGTH} to {PASSWORD_MAX_LENGTH} characters.",
            cure="Take a few words.",
        )
    return _HASHER.hash(password)


def password_matches(stored: str | None, password: str) -> bool:
    """Tells whether `password` is the one that was hashed; as slow for somebody unknown (None)."""
    try:
        return _HASHER.verify(stored or _nobody(), password[:PASSWORD_MAX_LENGTH]) and stored is not None
    except argon2.exceptions.VerificationError:
        return False


@functools.cache
def _nobody() -> str:
    """Verified when a name is unknown, so that the time of an answer does not tell which names exist."""
    return _HASHER.hash(secrets.token_hex(16))


class Throttle:
    """Refuses a key (a name, an address) for a while after FAILURES_ALLOWED failures within FAILURE_WINDOW_S."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._failures: dict[str, list[float]] = defaultdict(list)

    def check(self, key: str) -> None:
        """Raises PeerError when `key` has failed too often lately."""
        self._forget(key)
        if len(self._failures.get(key, ())) >= FAILURES_ALLOWED:
            raise PeerError("Too many failed attempts.", cure="Wait five minutes and try again.")

    def failed(self, key: str) -> None:
        """Counts one failure of `key`."""
        if len(self._failures) > 10_000:  # keys; a guesser of names must not eat our memory
            for other in list(self._failures):
                self._forget(other)
        self._failures[key].append(self._clock.monotonic())

    def _forget(self, key: str) -> None:
        oldest = self._clock.monotonic() - FAILURE_WINDOW_S
        recent = [at for at in self._failures.get(key, ()) if at > oldest]
        if recent:
            self._failures[key] = recent
        else:
            self._failures.pop(key, None)
