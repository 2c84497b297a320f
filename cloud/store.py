"""The cloud's truth: one SQL database, its engine, and the way to the newest schema.

Every room declares its tables in `cloud/<room>/tables.py` on METADATA; revisions live in `cloud/migrations`.
"""

from __future__ import annotations

import importlib
import importlib.util
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, DateTime, Dialect, Engine, MetaData, create_engine, event, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.types import TypeDecorator

from shared.errors import ConfigError, StateError

ROOMS_WITH_TABLES = ("access", "ingest", "registry", "rollout", "rounds", "training")
BUSY_TIMEOUT_S = 20.0

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class Moment(TypeDecorator[datetime]):
    """A point in time, timezone-aware UTC on the way in and out (SQLite keeps no zone)."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


def open_engine(url: str) -> Engine:
    """Returns an engine for `url`: SQLite (WAL, synchronous FULL) or PostgreSQL by psycopg.

    On SQLite every transaction begins IMMEDIATE, so that a read that turns into a write waits for its turn
    instead of failing half-way; pass `execution_options(read_only=True)` to a connection that only reads.

    Raises:
        ConfigError: the URL names neither SQLite nor PostgreSQL.
    """
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite":
        raise ConfigError(f"The database {parsed.drivername} is not supported.", cure="Use sqlite or postgresql.")
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver's own BEGIN would come too late: see _begin
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def load_tables() -> MetaData:
    """Returns METADATA with the tables of every room declared on it."""
    for room in ROOMS_WITH_TABLES:
        name = f"cloud.{room}.tables"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    return METADATA


def upgrade(url: str) -> None:
    """Brings the database at `url` to the newest revision; nothing happens when it is there.

    Raises:
        StateError: the database cannot be reached or a revision fails.
    """
    import alembic.command
    import alembic.config

    configuration = alembic.config.Config()
    configuration.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    configuration.attributes["url"] = url
    try:
        alembic.command.upgrade(configuration, "head")
    except SQLAlchemyError as exc:
        raise StateError(f"The database cannot be upgraded: {exc}.", cure="Check the URL and the server.") from exc
