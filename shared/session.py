"""Who is asking a page or an interface: a session cookie with a CSRF mark for pages, a bearer token for scripts.

Each side keeps its people in a store of its own; what a request must prove is the same on both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from fastapi import Request, Response

from shared.clock import Clock
from shared.errors import PeerError, TrustError
from shared.signin import SESSION_LIFETIME_S, Throttle, csrf_mark, csrf_matches

CredentialKind = Literal["session", "token"]
_SAFE = {"GET", "HEAD"}


class Someone(Protocol):
    """A person with a role; the table of who may do what is the side's own."""

    @property
    def role(self) -> str:
        """The name of the role."""

    def may(self, action: Any) -> bool:
        """Tells whether the role allows one of the side's actions."""


PersonT = TypeVar("PersonT", bound=Someone)
PersonT_co = TypeVar("PersonT_co", covariant=True)
ActionT = TypeVar("ActionT")


class Store(Protocol[PersonT_co]):
    """Where people and their credentials are kept."""

    def sign_in(self, name: str, password: str, kind: CredentialKind) -> str | None:
        """Returns a new session or token; None when the name or the password is wrong."""

    def who(self, kind: CredentialKind, secret: str) -> PersonT_co | None:
        """Returns the person that a session or token stands for; None when it is over."""


class SignInNeededError(TrustError):
    """Nobody is signed in; a page answers with the way to the login page."""


@dataclass(frozen=True)
class Signed(Generic[PersonT]):
    """A signed-in person; `mark` goes into the page's forms, empty for a bearer token."""

    person: PersonT
    secret: str
    mark: str


class Gatekeeper(Generic[PersonT, ActionT]):
    """Checks requests; `cookie` is the name of the side's session cookie."""

    def __init__(self, store: Store[PersonT], cookie: str, clock: Clock) -> None:
        self._store = store
        self._cookie = cookie
        self._throttle = Throttle(clock)

    def may(self, action: ActionT) -> Callable[[Request], Awaitable[Signed[PersonT]]]:
        """Returns a FastAPI dependency that lets a request pass when its person may do `action`.

        Raises (the dependency):
            SignInNeededError: nobody is signed in.
            TrustError: the role does not allow it, or the CSRF mark is missing.
        """

        async def check(request: Request) -> Signed[PersonT]:
            signed = await self.signed(request)
            if not signed.person.may(action):
                raise TrustError(f"The role {signed.person.role} may not do this.", cure="Ask an administrator.")
            return signed

        return check

    async def signed(self, request: Request) -> Signed[PersonT]:
        """Returns who is asking; a request that changes something must carry the page's CSRF mark."""
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._known("token", bearer, "")
        session = request.cookies.get(self._cookie, "")
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
        secret = self._store.sign_in(name, password, kind)
        if secret is None:
            for key in (f"name {name}", f"address {address}"):
                self._throttle.failed(key)
            raise PeerError("The name or the password is wrong.")
        return secret

    def _known(self, kind: CredentialKind, secret: str, mark: str) -> Signed[PersonT]:
        person = self._store.who(kind, secret) if secret else None
        if person is None:
            raise SignInNeededError("You are not signed in.", cure="Sign in.")
        return Signed(person, secret, mark)


def set_cookie(response: Response, name: str, session: str, *, secure: bool) -> None:
    """Gives the session to the browser: unseen by scripts, never sent from another site."""
    response.set_cookie(
        name, session, max_age=SESSION_LIFETIME_S, path="/", secure=secure, httponly=True, samesite="strict"
    )
