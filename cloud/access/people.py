"""People of the cloud: one-time links, passwords, sessions, bearer tokens, and the one table of who may do what."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from sqlalchemy import Connection, delete, insert, select, update

from cloud.access import audit
from cloud.access.tables import credentials, people
from shared.clock import Clock
from shared.errors import PeerError, TrustError
from shared.signin import (
    LINK_LIFETIME_S,
    ROLES,
    SESSION_LIFETIME_S,
    Role,
    hash_password,
    mint,
    password_matches,
    token_digest,
)

Action = Literal["fleet.read", "release.roll", "campaign.start", "node.invite", "people.invite", "audit.read"]
CredentialKind = Literal["session", "token"]
TOKEN_LIFETIME_S = 30 * 24 * 3600

# The one table of who may do what.
MAY: dict[Action, frozenset[Role]] = {
    "fleet.read": frozenset(ROLES),
    "release.roll": frozenset({"administrator", "engineer"}),
    "campaign.start": frozenset({"administrator", "engineer"}),
    "node.invite": frozenset({"administrator"}),
    "people.invite": frozenset({"administrator"}),
    "audit.read": frozenset({"administrator", "auditor"}),
}


@dataclass(frozen=True)
class Person:
    """Somebody who is signed in."""

    name: str
    role: Role

    def may(self, action: Action) -> bool:
        """Tells whether the role allows the action."""
        return self.role in MAY[action]


def invite_person(conn: Connection, clock: Clock, name: str, role: Role, *, actor: str) -> str:
    """Returns the token of a one-time link with which `name` sets a password; an existing person gets a new one.

    Raises:
        PeerError: an unusable name, or a role that does not exist.
    """
    if not 0 < len(name) <= 64 or not name.isprintable() or role not in ROLES:
        raise PeerError(f"Cannot invite {name!r} as {role!r}.", cure=f"The roles are {', '.join(ROLES)}.")
    row = conn.execute(select(people).where(people.c.name == name)).first()
    if row is None:
        person = conn.execute(insert(people).values(name=name, role=role).returning(people.c.id)).scalar_one()
    else:
        person = row.id
        conn.execute(update(people).where(people.c.id == person).values(role=role))
    audit.record(conn, clock, actor=actor, action="people.invited", subject=name, role=role)
    return _credential(conn, clock, "link", person, LINK_LIFETIME_S)


def role_named(word: str) -> Role:
    """Returns the role called `word`; PeerError when there is none."""
    for role in ROLES:
        if role == word:
            return role
    raise PeerError(f"There is no role {word!r}.", cure=f"The roles are {', '.join(ROLES)}.")


def has_people(conn: Connection) -> bool:
    """Tells whether anybody was ever invited."""
    return conn.execute(select(people.c.id).limit(1)).first() is not None


def link_owner(conn: Connection, clock: Clock, link: str) -> str | None:
    """Returns the name that a one-time link belongs to; None when it is used, expired or not ours."""
    found = _owner(conn, clock, "link", link)
    return found.name if found else None


def set_password(conn: Connection, clock: Clock, link: str, password: str) -> str:
    """Sets a password by a one-time link, ends the link and every open session of that person; returns the name.

    Raises:
        TrustError: the link is used, expired or not ours.
        PeerError: the password is too short.
    """
    owner = _owner(conn, clock, "link", link)
    if owner is None:
        raise TrustError("The link was used or has expired.", cure="Ask an administrator for a new one.")
    person = conn.execute(select(people.c.id).where(people.c.name == owner.name)).scalar_one()
    conn.execute(update(people).where(people.c.id == person).values(password=hash_password(password)))
    conn.execute(delete(credentials).where(credentials.c.person == person))
    audit.record(conn, clock, actor=owner.name, action="people.password_set", subject=owner.name)
    return owner.name


def sign_in(conn: Connection, clock: Clock, name: str, password: str, kind: CredentialKind = "session") -> str | None:
    """Returns a session (or bearer token) for a right password; None for a wrong one. Both are audited."""
    row = conn.execute(select(people).where(people.c.name == name)).first()
    if not password_matches(row.password if row else None, password):
        audit.record(conn, clock, actor="unknown", action="people.sign_in_refused", subject=name[:64])
        return None
    assert row is not None  # noqa: S101  password_matches is False for nobody
    audit.record(conn, clock, actor=name, action="people.signed_in", subject=name, kind=kind)
    return _credential(conn, clock, kind, row.id, SESSION_LIFETIME_S if kind == "session" else TOKEN_LIFETIME_S)


def who(conn: Connection, clock: Clock, kind: CredentialKind, secret: str) -> Person | None:
    """Returns the person that a session or bearer token stands for; None when it is over."""
    return _owner(conn, clock, kind, secret)


def sign_out(conn: Connection, secret: str) -> None:
    """Ends one session or token."""
    conn.execute(delete(credentials).where(credentials.c.digest == token_digest(secret)))


def _credential(conn: Connection, clock: Clock, kind: str, person: int, lifetime_s: int) -> str:
    conn.execute(delete(credentials).where(credentials.c.expires_at < clock.now()))
    secret = mint()
    expires = clock.now() + timedelta(seconds=lifetime_s)
    conn.execute(insert(credentials).values(digest=token_digest(secret), kind=kind, person=person, expires_at=expires))
    return secret


def _owner(conn: Connection, clock: Clock, kind: str, secret: str) -> Person | None:
    row = conn.execute(
        select(people.c.name, people.c.role)
        .join(credentials, credentials.c.person == people.c.id)
        .where(
            credentials.c.digest == token_digest(secret),
            credentials.c.kind == kind,
            credentials.c.expires_at > clock.now(),
        )
    ).first()
    return Person(row.name, row.role) if row else None
