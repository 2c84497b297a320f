"""Who is asking the people port: `shared.session` over the people in SQL, one table for both kinds of credential."""

from __future__ import annotations

from fastapi import Response
from sqlalchemy import Engine

from cloud.access import people
from cloud.access.people import Action, Person
from shared import session
from shared.clock import Clock

COOKIE = "__Host-radfleet"

SignInNeededError = session.SignInNeededError
Signed = session.Signed[Person]


class Gatekeeper(session.Gatekeeper[Person, Action]):
    """Checks requests of the people port."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        super().__init__(_People(engine, clock), COOKIE, clock)


class _People:
    """A `shared.session.Store`: a transaction for each question."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def sign_in(self, name: str, password: str, kind: people.CredentialKind) -> str | None:
        with self._engine.begin() as conn:
            return people.sign_in(conn, self._clock, name, password, kind)

    def who(self, kind: people.CredentialKind, secret: str) -> Person | None:
        with self._engine.connect().execution_options(read_only=True) as conn:
            return people.who(conn, self._clock, kind, secret)


def set_cookie(response: Response, secret: str) -> None:
    """Gives the session to the browser, over TLS only."""
    session.set_cookie(response, COOKIE, secret, secure=True)
