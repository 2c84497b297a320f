"""Work for the trainer."""

from __future__ import annotations

from sqlalchemy import JSON, Column, DateTime, Integer, String, Table, Text

from cloud.store import METADATA

# Work for the trainer. `key` makes asking twice harmless; a claim is a lease and lapses when its holder dies.
jobs = Table(
    "jobs",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("key", String(48), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),  # refit, aggregate, build
    Column("input", JSON, nullable=False),
    Column("state", String(8), nullable=False, index=True),  # queued, running, done, failed
    Column("output", JSON),
    Column("reason", Text, nullable=False),
    Column("holder", String(40), nullable=False),
    Column("lease_until", DateTime(timezone=True)),
    Column("attempts", Integer, nullable=False),
)
