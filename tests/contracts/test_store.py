"""What the cloud's truth promises, over every database that it may be."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, func, insert, select, text, update

from cloud.access import audit
from cloud.access.tables import audit as audit_rows
from cloud.access.tables import nodes
from cloud.store import load_tables, open_engine, upgrade
from scripts.lab.parts import start_postgres
from shared.errors import ConfigError, StateError, TrustError
from tests.simulators.release import HandClock

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


class StoreContract:
    """Every promise; subclasses supply an empty database's URL."""

    @pytest.fixture
    def engine(self, url: str) -> Iterator[Engine]:
        upgrade(url)
        engine = open_engine(url)
        yield engine
        engine.dispose()

    def test_upgrading_again_changes_nothing(self, url: str, engine: Engine) -> None:
        with engine.begin() as conn:
            conn.execute(insert(nodes).values(site="a", node="1", invited_at=NOON))
        upgrade(url)
        with engine.connect() as conn:
            assert conn.execute(select(func.count()).select_from(nodes)).scalar() == 1

    def test_the_revisions_make_exactly_the_tables_that_the_rooms_declare(self, engine: Engine) -> None:
        with engine.connect() as conn:
            assert compare_metadata(MigrationContext.configure(conn), load_tables()) == []

    def test_a_moment_comes_back_in_utc_whatever_zone_it_had(self, engine: Engine) -> None:
        elsewhere = NOON.astimezone(timezone(timedelta(hours=9)))
        with engine.begin() as conn:
            conn.execute(insert(nodes).values(site="a", node="1", invited_at=elsewhere))
            found = conn.execute(select(nodes.c.invited_at)).scalar_one()
        assert found == NOON
        assert found.utcoffset() == timedelta(0)

    def test_transactions_that_read_and_then_write_do_not_lose_each_other(self, engine: Engine) -> None:
        clock, threads = HandClock(), []

        def write(name: str) -> None:
            for _ in range(5):
                with engine.begin() as conn:
                    audit.record(conn, clock, actor=name, action="test.wrote", subject="x")

        for number in range(4):
            threads.append(threading.Thread(target=write, args=(f"writer {number}",)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        with engine.connect() as conn:
            assert audit.verify(conn)[0] == 20

    def test_a_changed_audit_entry_is_found(self, engine: Engine) -> None:
        self._write(engine)
        with engine.begin() as conn:
            conn.execute(update(audit_rows).where(audit_rows.c.serial == 2).values(actor="somebody else"))
        with engine.connect() as conn, pytest.raises(TrustError, match="entry 2 is wrong"):
            audit.verify(conn)

    def test_a_removed_audit_entry_is_found(self, engine: Engine) -> None:
        self._write(engine)
        with engine.begin() as conn:
            conn.execute(text("DELETE FROM audit WHERE serial = 2"))
        with engine.connect() as conn, pytest.raises(TrustError, match="entry 2 is wrong"):
            audit.verify(conn)

    def test_entries_cut_off_at_the_end_show_in_the_digest(self, engine: Engine) -> None:
        self._write(engine)
        with engine.begin() as conn:
            whole = audit.verify(conn)
            conn.execute(text("DELETE FROM audit WHERE serial = 3"))
            assert audit.verify(conn) == (2, conn.execute(select(audit_rows.c.digest).offset(1)).scalar())
            assert audit.verify(conn) != whole

    def _write(self, engine: Engine) -> None:
        with engine.begin() as conn:
            for number in range(3):
                audit.record(conn, HandClock(), actor="ada", action="test.wrote", subject=str(number), n=number)
            assert audit.verify(conn)[0] == 3


class TestSqlite(StoreContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path / 'cloud.sqlite'}"

    def test_it_survives_a_power_cut(self, engine: Engine) -> None:
        with engine.connect() as conn:
            assert conn.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
            assert conn.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
            assert conn.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


@pytest.mark.e2e
class TestPostgres(StoreContract):
    @pytest.fixture(scope="class")
    def server(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        postgres = start_postgres(tmp_path_factory.mktemp("postgres"))
        yield postgres.url
        postgres.child.stop()

    @pytest.fixture
    def url(self, server: str) -> str:
        engine = open_engine(server)
        with engine.begin() as conn:
            conn.execute(text("DROP SCHEMA public CASCADE"))
            conn.execute(text("CREATE SCHEMA public"))
        engine.dispose()
        return server


def test_a_database_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="mysql"):
        open_engine("mysql://localhost/radfleet")


def test_a_database_that_is_away_is_a_state_error(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot be upgraded"):
        upgrade(f"sqlite:///{tmp_path / 'nowhere' / 'cloud.sqlite'}")
