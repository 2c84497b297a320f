"""Who is asking: a session cookie with a CSRF mark for pages, a bearer token for scripts."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fastapi import Request, Response

from edge.web.labels import Action, CredentialKind, Labels, Person
from shared.clock import Clock
from shared.errors import PeerError, TrustError
from shared.signin import SESSION_LIFETIME_S, Throttle, csrf_mark, csrf_matches

COOKIE = "radfleet-session"
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
    """Checks requests to the reading page."""

    def __init__(self, labels: Labels, clock: Clock) -> None:
        self._labels = labels
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

    def sign_in(self, request: Request, name: str, password: str, kind: CredentialKind) -> str:
        """Returns a new session or token.

        Raises:
            PeerError: a wrong name or password, or too many of them lately.
        """
        address = request.client.host if request.client else "unknown"
        for key in (f"name {name}", f"address {address}"):
            self._throttle.check(key)
        secret = self._labels.sign_in(name, password, kind)
        if secret is None:
            for key in (f"name {name}", f"address {address}"):
                self._throttle.failed(key)
            raise PeerError("The name or the password is wrong.")
        return secret

    def _known(self, kind: CredentialKind, secret: str, mark: str) -> Signed:
        person = self._labels.who(kind, secret) if secret else None
        if person is None:
            raise SignInNeededError("You are not signed in.", cure="Sign in.")
        return Signed(person, secret, mark)


def set_cookie(response: Response, session: str, *, secure: bool) -> None:
    """Gives the session to the browser: unseen by scripts, never sent from another site, over TLS only where there is.

    Without TLS the page listens on loopback alone (`edge.config` sees to that).
    """
    response.set_cookie(
        COOKIE, session, max_age=SESSION_LIFETIME_S, path="/", secure=secure, httponly=True, samesite="strict"
    )
