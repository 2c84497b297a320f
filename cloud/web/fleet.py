"""What the fleet page shows and what it may ask for; the composition root supplies the deeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from cloud.access.tables import nodes
from cloud.registry.tables import releases
from cloud.rollout.tables import rollouts
from cloud.rounds.machine import Plan
from cloud.rounds.tables import campaigns, rounds
from shared.errors import PeerError
from shared.wire.records import NodeReport

SILENT_AFTER = timedelta(seconds=90)  # three missed reports
CAMPAIGNS_SHOWN = 5

NodeName = tuple[str, str]  # site, node


@dataclass(frozen=True)
class Deeds:
    """What a person may set in motion. Each is called in a transaction, names its actor, and audits itself."""

    roll_out: Callable[[Connection, int, Sequence[NodeName] | None, str], None]  # release; None: all nodes
    roll_back: Callable[[Connection, Sequence[NodeName] | None, str], None]
    start_campaign: Callable[[Connection, Mapping[str, Any], str], str]  # plan; returns the campaign's id


@dataclass(frozen=True)
class NodeView:
    """One node as people see it. `report` is its own word, written by the process that serves."""

    site: str
    node: str
    last_seen: datetime | None
    present: bool
    report: NodeReport | None

    @property
    def moving(self) -> str:
        """What the newest slot that has not settled is doing, for example `12: SHADOW`; empty when settled."""
        slots = [s for s in self.report.slots if s.state != "COMMITTED"] if self.report else []
        if not slots:
            return ""
        newest = max(slots, key=lambda slot: slot.release)
        return f"{newest.release}: {newest.state}{f' ({newest.reason})' if newest.reason else ''}"


def list_nodes(conn: Connection, now: datetime) -> list[NodeView]:
    """Returns the inventory with each node's newest report, by name."""
    views = []
    for row in conn.execute(select(nodes).order_by(nodes.c.site, nodes.c.node)):
        report = _report(row.report) if row.report else None
        present = row.last_seen is not None and now - row.last_seen < SILENT_AFTER
        views.append(NodeView(row.site, row.node, row.last_seen, present, report))
    return views


def champion_of(conn: Connection) -> tuple[str, list[NodeName]]:
    """Returns the newest package that a node serves, and every node that ever reported: who learns, from what.

    Raises:
        PeerError: no node has reported yet.
    """
    rows = conn.execute(select(nodes).where(nodes.c.report.is_not(None)).order_by(nodes.c.site, nodes.c.node)).all()
    reports = [_report(row.report) for row in rows]
    serving = [report for report in reports if report.package]
    if not serving:
        raise PeerError("No node serves a model yet.", cure="Enrol and start a node first.")
    return max(serving, key=lambda report: report.release).package, [(row.site, row.node) for row in rows]


def read_plan(plan: Mapping[str, Any]) -> Plan:
    """Returns a campaign's plan; PeerError names the key that is wrong."""
    try:
        return msgspec.convert(plan, Plan)
    except msgspec.ValidationError as exc:
        raise PeerError(f"Not a plan: {exc}.", cure="Keys and ranges: cloud.rounds.machine.Plan.") from exc


def list_releases(conn: Connection) -> list[dict[str, Any]]:
    """Returns the releases, newest first: number, package, name, state, times, and the gate's decision."""
    found = []
    for row in conn.execute(select(releases).order_by(releases.c.release.desc())):
        verdict = msgspec.json.decode(row.verdict) if row.verdict else None
        found.append(
            {
                "release": row.release,
                "package": row.package,
                "name": row.name,
                "state": row.state,
                "proposed_at": row.proposed_at.isoformat(),
                "published_at": row.published_at.isoformat() if row.published_at else None,
                "verdict": verdict,
            }
        )
    return found


def list_campaigns(conn: Connection) -> list[dict[str, Any]]:
    """Returns the newest campaigns with their rounds and what the gate said of each."""
    found = []
    newest = select(campaigns).order_by(campaigns.c.started_at.desc()).limit(CAMPAIGNS_SHOWN)
    for row in conn.execute(newest).all():
        of_it = select(rounds).where(rounds.c.campaign == row.id).order_by(rounds.c.number)
        found.append(
            {
                "id": row.id,
                "state": row.state,
                "champion": row.champion,
                "number": row.number,
                "max_rounds": row.plan.get("max_rounds", 0),
                "nodes": row.nodes,
                "reason": row.body.get("reason", ""),
                "started_at": row.started_at.isoformat(),
                "rounds": [
                    {"id": r.id, "number": r.number, "candidate": r.candidate, "verdict": r.verdict}
                    for r in conn.execute(of_it)
                ],
            }
        )
    return found


def newest_rollout(conn: Connection) -> dict[str, Any] | None:
    """Returns release, state and reason of the newest rollout; None before there was one."""
    row = conn.execute(select(rollouts).order_by(rollouts.c.id.desc()).limit(1)).first()
    return {"release": row.release, "state": row.state, "reason": row.reason} if row else None


def _report(kept: dict[str, Any]) -> NodeReport:
    # NodeReport is an array on the wire; the table keeps it as an object for people who query it.
    slots = [list(slot.values()) for slot in kept["slots"]]
    return msgspec.convert([*({**kept, "slots": slots}).values()], NodeReport)
