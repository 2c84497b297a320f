"""labels.sqlite: what the radiologist said, who may sign in, which callers were let in, and a record of it all.

The web process owns it. Labels are append-only: a correction is a newer row, and the newest row of an answer counts.
The pipeline follows `serial` to build cases from them.
"""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection
from typing import Literal

from edge.sqlite import open_owned, transaction
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

_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (
    serial INTEGER PRIMARY KEY AUTOINCREMENT,
    answer_id TEXT NOT NULL, head TEXT NOT NULL, label TEXT NOT NULL, by TEXT NOT NULL, at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS labels_answer ON labels (answer_id, serial);
CREATE TABLE IF NOT EXISTS people (name TEXT PRIMARY KEY, role TEXT NOT NULL, password TEXT);
CREATE TABLE IF NOT EXISTS credentials (
    digest TEXT PRIMARY KEY, kind TEXT NOT NULL, person TEXT NOT NULL REFERENCES people (name),
    expires_at REAL NOT NULL
);
-- Callers that an administrator let in; the intake process reads this beside dicom.allow.
CREATE TABLE IF NOT EXISTS admitted (
    ae_title TEXT NOT NULL, address TEXT NOT NULL, by TEXT NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (ae_title, address)
);
CREATE TABLE IF NOT EXISTS audit (
    serial INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    subject TEXT NOT NULL
);
"""
FIRST_ADMINISTRATOR = "administrator"

Action = Literal[
    "study.read",
    "study.label",
    "study.store",
    "status.read",
    "door.read",
    "door.admit",
    "forward.retry",
    "people.invite",
]
CredentialKind = Literal["session", "token"]

# The one table of who may do what. An administrator may label, because a small hospital has one person for both.
MAY: dict[Action, frozenset[Role]] = {
    "study.read": frozenset({"administrator", "radiologist", "auditor"}),
    "study.label": frozenset({"administrator", "radiologist"}),
    "study.store": frozenset({"administrator", "radiologist"}),
    "status.read": frozenset(ROLES),
    "door.read": frozenset(ROLES),
    "door.admit": frozenset({"administrator"}),
    "forward.retry": frozenset({"administrator"}),
    "people.invite": frozenset({"administrator"}),
}


@dataclass(frozen=True)
class Person:
    """Somebody who is signed in."""

    name: str
    role: Role

    def may(self, action: Action) -> bool:
        """Tells whether the role allows the action."""
        return self.role in MAY[action]


@dataclass(frozen=True)
class Label:
    """What somebody said about one answer."""

    label: str
    by: str
    at: str


@dataclass(frozen=True)
class Admitted:
    """A caller of the DICOM door that an administrator let in; `address` is empty for any."""

    ae_title: str
    address: str
    by: str
    at: str


class Labels:
    """The file, used by many threads of one process."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self._db = open_owned(path, _SCHEMA, 2)
        self._clock = clock
        self._lock = threading.Lock()

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def add(self, answer_id: str, head: str, label: str, by: Person) -> int:
        """Returns the serial of a new label; the same label by the same person again keeps the old row.

        Raises:
            TrustError: the role may not label.
        """
        if not by.may("study.label"):
            raise TrustError(f"The role {by.role} may not label.", cure="Ask a radiologist.")
        with self._writing() as db:
            last = db.execute(
                "SELECT serial, label, by FROM labels WHERE answer_id = ? ORDER BY serial DESC LIMIT 1", (answer_id,)
            ).fetchone()
            if last and (last["label"], last["by"]) == (label, by.name):
                return int(last["serial"])
            row = (answer_id, head, label, by.name, self._clock.now().isoformat(timespec="seconds"))
            done = db.execute("INSERT INTO labels (answer_id, head, label, by, at) VALUES (?, ?, ?, ?, ?)", row)
            return int(done.lastrowid or 0)

    def current(self) -> dict[str, Label]:
        """Returns the newest label of every answer that has one."""
        newest = "SELECT MAX(serial) FROM labels GROUP BY answer_id"
        rows = self._all(f"SELECT answer_id, label, by, at FROM labels WHERE serial IN ({newest})")  # noqa: S608  a constant
        return {row["answer_id"]: Label(row["label"], row["by"], row["at"]) for row in rows}

    def invite(self, name: str, role: str, *, actor: str) -> str:
        """Returns the token of a one-time link with which `name` sets a password.

        Raises:
            PeerError: an unusable name or role.
        """
        if not 0 < len(name) <= 64 or not name.isprintable() or role not in ROLES:
            raise PeerError(f"Cannot invite {name!r} as {role!r}.", cure=f"The roles are {', '.join(ROLES)}.")
        with self._writing() as db:
            db.execute(
                "INSERT INTO people (name, role) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET role = ?",
                (name, role, role),
            )
            self._note(db, actor, "people.invited", f"{name} as {role}")
            return self._credential(db, "link", name, LINK_LIFETIME_S)

    def has_people(self) -> bool:
        """Tells whether anybody was ever invited."""
        return bool(self._all("SELECT 1 FROM people LIMIT 1"))

    def link_owner(self, link: str) -> str | None:
        """Returns whose one-time link this is; None when it is used, expired or not ours."""
        person = self._owner("link", link)
        return person.name if person else None

    def set_password(self, link: str, password: str) -> str:
        """Sets a password by a one-time link, ends the link and all sessions of that person; returns the name.

        Raises:
            TrustError: the link is used, expired or not ours.
            PeerError: the password is too short.
        """
        hashed = hash_password(password)
        with self._writing() as db:
            person = self._owner("link", link, db)
            if person is None:
                raise TrustError("The link was used or has expired.", cure="Ask an administrator for a new one.")
            db.execute("UPDATE people SET password = ? WHERE name = ?", (hashed, person.name))
            db.execute("DELETE FROM credentials WHERE person = ?", (person.name,))
            self._note(db, person.name, "people.password_set", person.name)
        return person.name

    def sign_in(self, name: str, password: str, kind: CredentialKind) -> str | None:
        """Returns a new session or bearer token; None when the name or the password is wrong."""
        rows = self._all("SELECT password FROM people WHERE name = ?", name)
        right = password_matches(rows[0]["password"] if rows else None, password)
        with self._writing() as db:
            if not right:
                self._note(db, "unknown", "people.sign_in_refused", name[:64])
                return None
            self._note(db, name, "people.signed_in", kind)
            return self._credential(db, kind, name, SESSION_LIFETIME_S)

    def who(self, kind: CredentialKind, secret: str) -> Person | None:
        """Returns the person that a session or token stands for; None when it is over."""
        return self._owner(kind, secret)

    def sign_out(self, secret: str) -> None:
        """Ends a session."""
        with self._writing() as db:
            db.execute("DELETE FROM credentials WHERE digest = ?", (token_digest(secret),))

    def record(self, actor: Person, action: str, subject: str) -> None:
        """Writes a row of the audit: who did what; `subject` names no patient."""
        with self._writing() as db:
            self._note(db, actor.name, action, subject)

    def admit(self, ae_title: str, address: str, by: Person) -> None:
        """Lets a caller in: this AE title from this address (empty: from any).

        Raises:
            TrustError: the role may not admit.
            PeerError: the title or the address is none.
        """
        self._check_admission(ae_title, address, by)
        row = (ae_title, address, by.name, self._clock.now().isoformat(timespec="seconds"))
        with self._writing() as db:
            db.execute("INSERT OR IGNORE INTO admitted (ae_title, address, by, at) VALUES (?, ?, ?, ?)", row)
            self._note(db, by.name, "door.admitted", f"{ae_title} at {address or 'any address'}")

    def revoke(self, ae_title: str, address: str, by: Person) -> None:
        """Takes an admission back; raises what `admit` raises."""
        self._check_admission(ae_title, address, by)
        with self._writing() as db:
            db.execute("DELETE FROM admitted WHERE ae_title = ? AND address = ?", (ae_title, address))
            self._note(db, by.name, "door.revoked", f"{ae_title} at {address or 'any address'}")

    def admitted(self) -> list[Admitted]:
        """Returns the callers that were let in, by AE title."""
        rows = self._all("SELECT ae_title, address, by, at FROM admitted ORDER BY ae_title, address")
        return [Admitted(**row) for row in rows]

    def _check_admission(self, ae_title: str, address: str, by: Person) -> None:
        if not by.may("door.admit"):
            raise TrustError(f"The role {by.role} may not admit callers.", cure="Ask an administrator.")
        if not 0 < len(ae_title.strip()) <= 16 or not ae_title.isascii() or not ae_title.isprintable():
            raise PeerError("This is no AE title.", cure="Take the title that the caller gave: 1 to 16 characters.")
        try:
            if address:
                ipaddress.ip_network(address, strict=False)
        except ValueError as exc:
            raise PeerError("This is no address.", cure="Give an IP address or a network, or nothing for any.") from exc

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._lock, transaction(self._db) as db:
            yield db

    def _all(self, question: str, *values: object) -> list[dict[str, str]]:
        with self._lock:
            return [dict(row) for row in self._db.execute(question, values)]

    def _credential(self, db: Connection, kind: str, person: str, lifetime_s: int) -> str:
        now = self._clock.now().timestamp()
        db.execute("DELETE FROM credentials WHERE expires_at < ?", (now,))
        secret = mint()
        db.execute(
            "INSERT INTO credentials VALUES (?, ?, ?, ?)", (token_digest(secret), kind, person, now + lifetime_s)
        )
        return secret

    def _owner(self, kind: str, secret: str, db: Connection | None = None) -> Person | None:
        question = (
            "SELECT name, role FROM people JOIN credentials ON person = name"
            " WHERE digest = ? AND kind = ? AND expires_at > ?"
        )
        values = (token_digest(secret), kind, self._clock.now().timestamp())
        rows = [dict(row) for row in db.execute(question, values)] if db else self._all(question, *values)
        for role in ROLES:
            if rows and rows[0]["role"] == role:
                return Person(rows[0]["name"], role)
        return None

    def _note(self, db: Connection, actor: str, action: str, subject: str) -> None:
        at = self._clock.now().isoformat(timespec="seconds")
        db.execute("INSERT INTO audit (at, actor, action, subject) VALUES (?, ?, ?, ?)", (at, actor, action, subject))
