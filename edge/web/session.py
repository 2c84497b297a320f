"""Who is asking the reading page: `shared.session` over the people in labels.sqlite."""

from __future__ import annotations

from fastapi import Response

from edge.web.labels import Action, Labels, Person
from shared import session
from shared.clock import Clock

COOKIE = "radfleet-session"

SignInNeededError = session.SignInNeededError
Signed = session.Signed[Person]


class Gatekeeper(session.Gatekeeper[Person, Action]):
    """Checks requests to the reading page."""

    def __init__(self, labels: Labels, clock: Clock) -> None:
        super().__init__(labels, COOKIE, clock)


def set_cookie(response: Response, secret: str, *, secure: bool) -> None:
    """Gives the session to the browser, over TLS only where there is TLS.

    Without it the page listens on loopback alone (`edge.config` sees to that).
    """
    session.set_cookie(response, COOKIE, secret, secure=secure)
