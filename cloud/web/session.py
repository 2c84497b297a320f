"""Who is asking: a session cookie with a CSRF mark for pages, a bearer token for scripts, one table for both."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request, Response
from sqlalchemy import Engine

from cloud.access import people
from cloud.access.people import Action, Person
from shared.clock import Clock
from shared.errors import PeerError, TrustError
from shared.signin import SESSION_LIFETIME_S, Throttle, csrf_mark, csrf_matches

COOKIE = "__Host-radfleet"
_SAFE = {"GET", "HEAD"}


class SignInNeededError(TrustError):
    """Nobody is signed in; a page answers with the way to the login page."""


@dataclass(frozen=True)
class Signed:
    """A signed-in person; `mark` goes into the page's forms, empty for a bearer token."""

    person: Person
    secret: str
    mark: str


class Gatekeeper:
    """Checks requests of the people port."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._throttle = Throttle(clock)

    def may(self, action: Action) -> Callable[[Request], Awaitable[Signed]]:
        """Returns a FastAPI dependency that lets a request pass when its person may do `action`.

        Raises (the dependency):
            SignInNeededError: nobody is signed in.
            TrustError: the role does not allow it, or the CSRF mark is missing.
        """

        async def check(request: Request) -> Signed:
            signed = await self.signed(request)
            if not signed.person.may(action):
                raise TrustError(f"The role {signed.person.role} may not do this.", cure="Ask an administrator.")
            return signed

        return check

    async def signed(self, request: Request) -> Signed:
        """Returns who is asking; a request that changes something must carry the page's CSRF mark."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._known("token", bearer, "")
        session = request.cookies.get(COOKIE, "")
        signed = self._known("session", session, csrf_mark(session))
        if request.method not in _SAFE:
            mark = request.headers.get("x-csrf-token") or str((await request.form()).get("csrf", ""))
            if not csrf_matches(session, mark):
                raise TrustError("The page is out of date.", cure="Load it again and repeat.")
        return signed

    def sign_in(self, request: Request, name: str, password: str, kind: people.CredentialKind) -> str:
        """Returns a new session or token.

        Raises:
            PeerError: a wrong name or password, or too many of them lately.
        """
        address = request.client.host if request.client else "unknown"
        for key in (f"name {name}", f"address {address}"):
            self._throttle.check(key)
        with self._engine.begin() as conn:
            secret = people.sign_in(conn, self._clock, name, password, kind)
        if secret is None:
            for key in (f"name {name}", f"address {address}"):
                self._throttle.failed(key)
            raise PeerError("The name or the password is wrong.")
        return secret

    def _known(self, kind: people.CredentialKind, secret: str, mark: str) -> Signed:
        with self._engine.connect().execution_options(read_only=True) as conn:
            person = people.who(conn, self._clock, kind, secret) if secret else None
        if person is None:
            raise SignInNeededError("You are not signed in.", cure="Sign in.")
        return Signed(person, secret, mark)


def set_cookie(response: Response, session: str) -> None:
    """Gives the session to the browser: over TLS only, unseen by scripts, never sent from another site."""
    response.set_cookie(
        COOKIE, session, max_age=SESSION_LIFETIME_S, path="/", secure=True, httponly=True, samesite="strict"
    )
