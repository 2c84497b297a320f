"""Who may do what: sites' nodes, their devices and invitations, people and sessions, and the audit log."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from cloud.store import METADATA, Moment

# The inventory, and what each node last said of itself (shared.wire.records.NodeReport as JSON).
nodes = Table(
    "nodes",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("invited_at", Moment, nullable=False),
    Column("last_seen", Moment),
    Column("incarnation", String(32)),  # with `sequence`: which message the report came in
    Column("sequence", BigInteger),
    Column("report", JSON),
)

# Certificates issued to nodes; the newest not revoked is the node's. `key` is the raw Ed25519 public key.
devices = Table(
    "devices",
    METADATA,
    Column("serial", String(40), primary_key=True),  # hexadecimal serial number of the certificate
    Column("site", String(32), nullable=False, index=True),
    Column("node", String(32), nullable=False),
    Column("key", LargeBinary(32), nullable=False),
    Column("certificate", LargeBinary, nullable=False),  # DER
    Column("issued_at", Moment, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("revoked", Boolean, nullable=False, default=False),
)

# Single-use enrolment tokens; only the digest of the secret is kept.
invitations = Table(
    "invitations",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("site", String(32), nullable=False),
    Column("node", String(32), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("expires_at", Moment, nullable=False),
    Column("used_at", Moment),
)

people = Table(
    "people",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False),
    Column("role", String(16), nullable=False),
    Column("password", String(200)),  # argon2id; empty until the one-time link was followed
    UniqueConstraint("name"),
)

# One-time links (kind "link"), page sessions ("session") and scripts' bearer tokens ("token"): digests only.
credentials = Table(
    "credentials",
    METADATA,
    Column("digest", String(64), primary_key=True),
    Column("kind", String(8), nullable=False),
    Column("person", ForeignKey("people.id", ondelete="CASCADE"), nullable=False),
    Column("expires_at", Moment, nullable=False),
)

# Append-only: `digest` covers the row and the digest before it (see cloud.access.audit).
audit = Table(
    "audit",
    METADATA,
    Column("serial", Integer, primary_key=True, autoincrement=False),
    Column("at", String(32), nullable=False),
    Column("actor", String(80), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(200), nullable=False),
    Column("detail", Text, nullable=False),
    Column("digest", String(64), nullable=False),
)
