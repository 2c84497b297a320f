"""What came up the wire and what is to go down it."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from cloud.store import METADATA

# One row a sealed message that was accepted; `record` is the digest of the opened record in the object store
# (empty for reports, which live in `nodes`).
messages = Table(
    "messages",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("incarnation", String(32), primary_key=True),
    Column("sequence", BigInteger, primary_key=True, autoincrement=False),
    Column("id", String(32), nullable=False),
    Column("digest", String(64), nullable=False),  # SHA-256 of the sealed bytes
    Column("stage", String(16), nullable=False),
    Column("round", String(64), nullable=False),
    Column("record", String(64), nullable=False),
    Column("length", Integer, nullable=False),  # bytes, sealed
    Column("received_at", DateTime(timezone=True), nullable=False),
    UniqueConstraint("site", "node", "digest"),
    Index("ix_messages_stage_round", "stage", "round"),
)

# Which sequence numbers of an incarnation are used: bit (sequence mod WINDOW) of `seen`, for the newest.
windows = Table(
    "replay_windows",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("incarnation", String(32), primary_key=True),
    Column("highest", BigInteger, nullable=False),
    Column("seen", LargeBinary, nullable=False),
)

# Messages refused for good: the same bytes get the same answer and are counted, not examined, again.
refusals = Table(
    "refusals",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("id", String(32), nullable=False),
    Column("stage", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("times", Integer, nullable=False),
    Column("first_at", DateTime(timezone=True), nullable=False),
    Column("last_at", DateTime(timezone=True), nullable=False),
)

# Messages of several chunks that are not whole yet.
transfers = Table(
    "transfers",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("total", Integer, nullable=False),  # bytes
    Column("touched_at", DateTime(timezone=True), nullable=False),
)

chunks = Table(
    "chunks",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("digest", String(64), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
    ForeignKeyConstraint(
        ["site", "node", "digest"],
        ["transfers.site", "transfers.node", "transfers.digest"],
        ondelete="CASCADE",
    ),
)

# The state the cloud wants each node to be in. `document` is signed and is what the node gets, retained.
desired = Table(
    "desired",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("serial", BigInteger, nullable=False),
    Column("document", LargeBinary, nullable=False),
)
