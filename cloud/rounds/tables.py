"""What learning must never forget: campaigns, rounds, what nodes sent, and who may move them."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Table,
)

from cloud.store import METADATA

# One learning run: from a champion to a registered candidate, or to the end of its rounds.
campaigns = Table(
    "campaigns",
    METADATA,
    Column("id", String(16), primary_key=True),
    Column("state", String(16), nullable=False, index=True),  # cloud.rounds.machine.State
    Column("champion", String(64), nullable=False),
    Column("nodes", JSON, nullable=False),  # [[site, node], ...]
    Column("plan", JSON, nullable=False),  # cloud.rounds.machine.Plan
    Column("number", Integer, nullable=False),  # of the round; 0 is the fast lane alone
    Column("body", JSON, nullable=False),  # cloud.rounds.machine.Progress
    Column("started_at", DateTime(timezone=True), nullable=False),
    Column("since", DateTime(timezone=True), nullable=False),  # when `state` was entered
)

# One row a round: what it started from, what came of it, and what the gate said.
rounds = Table(
    "rounds",
    METADATA,
    Column("id", String(24), primary_key=True),  # <campaign>-<number>
    Column("campaign", ForeignKey("campaigns.id"), nullable=False, index=True),
    Column("number", Integer, nullable=False),
    Column("base", String(64), nullable=False),  # digest of the weights every node started from
    Column("layout", JSON, nullable=False),  # [[name, [shape]], ...] of the trainable tensors
    Column("max_norm", Float, nullable=False),
    Column("collecting", Boolean, nullable=False),  # False: an update that arrives now is late
    Column("weights", String(64)),  # after the average
    Column("candidate", String(64)),
    Column("average", JSON),  # cloud.rounds.aggregate.Average
    Column("verdict", JSON),  # cloud.training.gate.Verdict
    Column("opened_at", DateTime(timezone=True), nullable=False),
    Column("closed_at", DateTime(timezone=True)),
)

updates = Table(
    "updates",
    METADATA,
    Column("round", ForeignKey("rounds.id"), primary_key=True),
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("cases", Integer, nullable=False),
    Column("norm", Float, nullable=False),  # measured here, not claimed
    Column("loss_before", Float, nullable=False),
    Column("loss_after", Float, nullable=False),
    Column("blob", String(64)),  # in the object store; none when the node had no cases
    Column("length", Integer, nullable=False),  # bytes of the blob
    Column("late", Boolean, nullable=False),  # recorded, not averaged
    Column("received_at", DateTime(timezone=True), nullable=False),
)

judgements = Table(
    "judgements",
    METADATA,
    Column("round", ForeignKey("rounds.id"), primary_key=True),
    Column("site", String(32), primary_key=True),
    Column("node", String(32), primary_key=True),
    Column("heads", JSON, nullable=False),  # [shared.wire.records.HeadJudgement]
    Column("received_at", DateTime(timezone=True), nullable=False),
)

# The newest confirmed label of each case and its embedding; never a pixel.
features = Table(
    "features",
    METADATA,
    Column("site", String(32), primary_key=True),
    Column("case", String(32), primary_key=True),
    Column("package", String(64), primary_key=True),
    Column("variant", String(32), primary_key=True),
    Column("head", String(64), nullable=False),
    Column("label", Integer, nullable=False),
    Column("held_out", Boolean, nullable=False),
    Column("data", LargeBinary, nullable=False),  # float16 little endian, the package's feature_size values
    Column("received_at", DateTime(timezone=True), nullable=False),
)

# Who may move campaigns. `fence` grows with each new holder: a holder that slept past its lease cannot write.
leases = Table(
    "leases",
    METADATA,
    Column("name", String(32), primary_key=True),
    Column("holder", String(40), nullable=False),
    Column("fence", Integer, nullable=False),
    Column("until", DateTime(timezone=True), nullable=False),
)

# What happened, in order, for the fleet page and the report of a campaign.
events = Table(
    "campaign_events",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("campaign", ForeignKey("campaigns.id"), nullable=False, index=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("what", String(40), nullable=False),
    Column("detail", JSON, nullable=False),
)
