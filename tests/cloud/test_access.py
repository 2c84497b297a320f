"""People of the cloud: links, passwords, sessions, and the table of who may do what."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from sqlalchemy import Connection, insert, select

from cloud.access import people
from cloud.access.authority import Authority, create_authority, ensure_service, load_authority
from cloud.access.people import MAY, Person
from cloud.access.reports import take_report
from cloud.access.tables import nodes
from cloud.store import open_engine, upgrade
from shared.errors import PeerError, StateError, TrustError
from shared.signin import LINK_LIFETIME_S, ROLES, SESSION_LIFETIME_S, Throttle
from shared.wire.envelope import Header
from shared.wire.records import NodeReport
from tests.simulators.access import PASSWORD
from tests.simulators.release import HandClock


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def conn(tmp_path: Path) -> Iterator[Connection]:
    url = f"sqlite:///{tmp_path / 'cloud.sqlite'}"
    upgrade(url)
    engine = open_engine(url)
    with engine.begin() as conn:
        yield conn
    engine.dispose()


def test_a_link_sets_a_password_once(conn: Connection, clock: HandClock) -> None:
    link = people.invite_person(conn, clock, "ada", "engineer", actor="test")
    assert people.link_owner(conn, clock, link) == "ada"
    assert people.set_password(conn, clock, link, PASSWORD) == "ada"
    with pytest.raises(TrustError, match="used or has expired"):
        people.set_password(conn, clock, link, PASSWORD)
    session = people.sign_in(conn, clock, "ada", PASSWORD)
    assert session
    assert people.who(conn, clock, "session", session) == Person("ada", "engineer")


def test_a_link_ends_after_a_day(conn: Connection, clock: HandClock) -> None:
    link = people.invite_person(conn, clock, "ada", "engineer", actor="test")
    clock.advance(LINK_LIFETIME_S + 1)
    assert people.link_owner(conn, clock, link) is None


def test_a_session_ends_by_time_by_signing_out_and_by_a_new_password(conn: Connection, clock: HandClock) -> None:
    people.set_password(conn, clock, people.invite_person(conn, clock, "ada", "engineer", actor="t"), PASSWORD)
    first, second, third = (people.sign_in(conn, clock, "ada", PASSWORD) or "" for _ in range(3))
    people.sign_out(conn, first)
    assert people.who(conn, clock, "session", first) is None
    assert people.who(conn, clock, "token", second) is None  # a session is no bearer token
    link = people.invite_person(conn, clock, "ada", "engineer", actor="t")
    people.set_password(conn, clock, link, PASSWORD + "!")
    assert people.who(conn, clock, "session", second) is None
    fresh = people.sign_in(conn, clock, "ada", PASSWORD + "!") or ""
    clock.advance(SESSION_LIFETIME_S + 1)
    assert people.who(conn, clock, "session", fresh) is None
    assert third


def test_no_password_no_name_and_a_wrong_password_are_the_same_answer(conn: Connection, clock: HandClock) -> None:
    people.invite_person(conn, clock, "grace", "auditor", actor="test")  # has not followed the link
    people.set_password(conn, clock, people.invite_person(conn, clock, "ada", "engineer", actor="t"), PASSWORD)
    for name, password in (("ada", "wrong password"), ("grace", ""), ("nobody", PASSWORD)):
        assert people.sign_in(conn, clock, name, password) is None


def test_secrets_are_stored_as_digests_only(conn: Connection, clock: HandClock, tmp_path: Path) -> None:
    link = people.invite_person(conn, clock, "ada", "engineer", actor="test")
    people.set_password(conn, clock, link, PASSWORD)
    session = people.sign_in(conn, clock, "ada", PASSWORD) or ""
    conn.commit()
    stored = b"".join(path.read_bytes() for path in tmp_path.glob("cloud.sqlite*"))
    assert b"ada" in stored
    for secret in (link, session, PASSWORD):
        assert secret.encode() not in stored


@pytest.mark.parametrize("password", ["short", "x" * 201])
def test_a_password_has_bounds(conn: Connection, clock: HandClock, password: str) -> None:
    link = people.invite_person(conn, clock, "ada", "engineer", actor="test")
    with pytest.raises(PeerError, match="12 to 200"):
        people.set_password(conn, clock, link, password)
    assert people.link_owner(conn, clock, link) == "ada"  # a slip does not cost the link


def test_a_role_that_does_not_exist_is_refused() -> None:
    with pytest.raises(PeerError, match="no role 'root'"):
        people.role_named("root")


def test_every_action_names_roles_that_exist_and_administrators_may_all() -> None:
    for action, roles in MAY.items():
        assert roles <= set(ROLES), action
        assert "administrator" in roles, action
    assert {action for action, roles in MAY.items() if "auditor" in roles} == {"fleet.read", "audit.read"}
    assert {action for action, roles in MAY.items() if "radiologist" in roles} == {"fleet.read"}


def test_a_guesser_waits(clock: HandClock) -> None:
    throttle = Throttle(clock)
    for _ in range(5):
        throttle.check("ada")
        throttle.failed("ada")
    throttle.check("grace")
    with pytest.raises(PeerError, match="Too many"):
        throttle.check("ada")
    clock.advance(301)
    throttle.check("ada")


class TestAuthority:
    @pytest.fixture
    def authority(self, tmp_path: Path, clock: HandClock) -> Authority:
        return create_authority(tmp_path, clock.now())

    def hosts(self, folder: Path) -> list[str]:
        certificate = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return sorted(str(name.value) for name in names)

    def test_it_is_the_same_after_loading(self, authority: Authority, tmp_path: Path) -> None:
        assert load_authority(tmp_path).fingerprint == authority.fingerprint
        (tmp_path / "ca.key").write_text("nonsense")
        with pytest.raises(StateError, match="cannot be read"):
            load_authority(tmp_path)

    def test_a_server_certificate_is_kept_until_it_must_change(
        self, authority: Authority, tmp_path: Path, clock: HandClock
    ) -> None:
        def ensure(*hosts: str) -> bytes:
            ensure_service(authority, tmp_path, "server", "server", hosts, clock.now())
            return (tmp_path / "server.pem").read_bytes()

        first = ensure("localhost", "127.0.0.1")
        assert ensure("localhost", "127.0.0.1") == first
        second = ensure("radfleet.example", "10.0.0.2")
        assert second != first
        assert self.hosts(tmp_path) == ["10.0.0.2", "radfleet.example"]
        clock.advance(timedelta(days=270).total_seconds())
        assert ensure("radfleet.example", "10.0.0.2") != second

    def test_a_node_is_no_server_and_no_authority(self, authority: Authority, clock: HandClock) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        from shared.wire.identity import Identity

        issued = authority.issue_device(Ed25519PrivateKey.generate().public_key(), Identity("a", "1"), clock.now())
        usage = issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert [use.dotted_string for use in usage] == ["1.3.6.1.5.5.7.3.2"]
        assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


class TestReports:
    def header(self, sequence: int, incarnation: str = "i1", site: str = "a") -> Header:
        return Header(1, site, "1", incarnation, "report", "0" * 32, sequence, "", "0" * 16, 0)

    def report(self, studies: int) -> NodeReport:
        return NodeReport("0.1", "a" * 64, 1, "cpu-u8s8", "b" * 64, "c" * 64, 7, "cpu", [], studies, 0, 0, 0, 0, True)

    def studies(self, conn: Connection) -> int:
        return int(conn.execute(select(nodes.c.report)).scalar_one()["studies"])

    def test_the_newest_report_counts_whatever_order_they_come_in(self, conn: Connection, clock: HandClock) -> None:
        conn.execute(insert(nodes).values(site="a", node="1", invited_at=clock.now()))
        take_report(conn, self.header(5), self.report(50), clock)
        take_report(conn, self.header(3), self.report(30), clock)
        assert self.studies(conn) == 50
        take_report(conn, self.header(1, "i2"), self.report(1), clock)  # a re-imaged node counts anew
        assert self.studies(conn) == 1

    def test_a_node_that_nobody_invited_is_refused(self, conn: Connection, clock: HandClock) -> None:
        with pytest.raises(TrustError, match="not in the inventory"):
            take_report(conn, self.header(1, site="b"), self.report(1), clock)
