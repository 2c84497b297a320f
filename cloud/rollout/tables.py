"""Rollouts and what each named node was told; at most one rollout is running."""

from __future__ import annotations

from sqlalchemy import JSON, Column, ForeignKey, Integer, String, Table, Text

from cloud.store import METADATA, Moment

rollouts = Table(
    "rollouts",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("release", Integer, nullable=False),
    Column("policy", JSON, nullable=False),  # cloud.rollout.plan.Policy
    Column("state", String(16), nullable=False),  # running, done, halted, recalled, superseded
    Column("reason", Text, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("ended_at", Moment),
)

rollout_nodes = Table(
    "rollout_nodes",
    METADATA,
    Column("rollout", Integer, ForeignKey("rollouts.id", ondelete="CASCADE"), primary_key=True),
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("position", Integer, nullable=False),
    Column("before", Integer, nullable=False),  # the release it goes back to
    Column("slot_before", String(16), nullable=False),  # what its journal said of the release before it was ordered
    Column("ordered_at", Moment),
    Column("committed_at", Moment),
)
