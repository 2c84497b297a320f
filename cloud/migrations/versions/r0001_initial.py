"""Initial schema: every room's tables."""

from __future__ import annotations

from alembic import op

from cloud.store import load_tables

revision = "r0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    load_tables().create_all(op.get_bind())
