"""Carries rollouts out: reads what nodes report, asks `next_step`, and tells the director and the nodes.

The director is written before the SQL transaction commits and its assignments are absolute, so a crash in between is
healed by the next step, which decides the same again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from sqlalchemy import Connection, Row, insert, select, update

from cloud.access.tables import nodes
from cloud.registry.director import Director, Named
from cloud.registry.repository import ReleaseRepository
from cloud.rollout.plan import Cohort, Halt, Hold, NodeState, Policy, Recall, Step, next_step
from cloud.rollout.tables import rollout_nodes, rollouts
from shared.clock import Clock
from shared.errors import PeerError
from shared.log import get_logger
from shared.package.manifest import Manifest
from shared.package.release import read_note
from shared.wire.records import ReleaseOrder

NodeName = tuple[str, str]  # site, node

log = get_logger()


class SetOrder(Protocol):
    """Puts an order into a node's desired state (cloud.ingest.desired.DesiredStates.set_order)."""

    def __call__(self, conn: Connection, site: str, node: str, order: ReleaseOrder | None) -> None: ...


@dataclass(frozen=True)
class Told:
    """What a node's newest report says of one release."""

    slot: str
    serves: bool
    fault: str


class Rollouts:
    """Starts, steps, and takes back rollouts, each call inside the caller's SQL transaction."""

    def __init__(self, repository: ReleaseRepository, director: Director, *, set_order: SetOrder, clock: Clock) -> None:
        self._repository = repository
        self._director = director
        self._set_order = set_order
        self._clock = clock

    def start(
        self,
        conn: Connection,
        release: int,
        names: Sequence[NodeName] | None,
        actor: str,
        policy: Policy | None = None,
    ) -> int:
        """Returns the id of a new rollout of `release` to `names`, None being the whole inventory by name.

        Whatever rollout was running ends as superseded. Nothing is ordered before the first `step`.

        Raises:
            PeerError: the release is not published, or a node is not in the inventory.
        """
        self._package(release)
        chosen = self._choose(conn, names)
        now = self._clock.now()
        running = rollouts.c.state == "running"
        conn.execute(
            update(rollouts).where(running).values(state="superseded", reason=f"by release {release}", ended_at=now)
        )
        values = {
            "release": release,
            "policy": msgspec.to_builtins(policy or Policy()),
            "state": "running",
            "reason": "",
            "actor": actor,
            "started_at": now,
        }
        found = conn.execute(insert(rollouts).values(values).returning(rollouts.c.id)).scalar_one()
        for position, name in enumerate(chosen):
            conn.execute(
                insert(rollout_nodes).values(
                    rollout=found,
                    site=name[0],
                    node=name[1],
                    position=position,
                    before=self._before(conn, name, release),
                    slot_before="",
                )
            )
        return int(found)

    def step(self, conn: Connection) -> Step | None:
        """Takes the running rollout one step on; None when none is running."""
        rollout = conn.execute(select(rollouts).where(rollouts.c.state == "running")).first()
        if rollout is None:
            return None
        fleet = self._fleet(conn, rollout)
        step = next_step(fleet, msgspec.convert(rollout.policy, Policy), self._clock.now())
        if isinstance(step, Cohort):
            self._order(conn, rollout, step.nodes)
        elif isinstance(step, Halt):
            self._name(conn, dict.fromkeys(step.nodes))
            self._end(conn, rollout, "halted", step.reason)
        elif isinstance(step, Recall):
            self._send_back(conn, rollout, step.nodes)
            self._end(conn, rollout, "recalled", step.reason)
        elif isinstance(step, Hold) and step.done:
            self._end(conn, rollout, "done", step.reason)
        return step

    def roll_back(self, conn: Connection, names: Sequence[NodeName] | None, actor: str) -> None:
        """Sends nodes, None being all of the newest rollout, back to what they were named before it, at once.

        Raises:
            PeerError: nothing was rolled out yet.
        """
        newest = select(rollouts).order_by(rollouts.c.id.desc()).limit(1)
        rollout = conn.execute(newest).first()
        if rollout is None:
            raise PeerError("Nothing was rolled out yet.")
        ordered = {(r.site, r.node) for r in self._rows(conn, rollout) if r.ordered_at is not None}
        chosen = [name for name in (names if names is not None else sorted(ordered)) if name in ordered]
        self._send_back(conn, rollout, chosen)
        if names is None or rollout.state == "running":
            self._end(conn, rollout, "recalled", f"by {actor}")

    def _fault(self, report: Mapping[str, Any], manifest: Manifest) -> str:
        """Returns why what a node says it has loaded is not what the release holds; empty when it is."""
        files = {v.name: manifest.file(v.file).sha256 for v in manifest.variants}
        if files.get(report["variant"]) != report["weights_loaded"]:
            return f"serves other weights than release {manifest.release} holds"
        return "" if report["golden"] else "serves without a golden proof"

    def _fleet(self, conn: Connection, rollout: Row[Any]) -> list[NodeState]:
        package = self._package(rollout.release)
        manifest = self._repository.manifest(rollout.release)
        fleet = []
        for row in self._rows(conn, rollout):
            here = (nodes.c.site == row.site) & (nodes.c.node == row.node)
            known = conn.execute(select(nodes.c.last_seen, nodes.c.report).where(here)).first()
            told = self._told(known.report if known else None, package, manifest)
            committed_at = row.committed_at
            if row.ordered_at is not None and told.serves and committed_at is None:
                committed_at = self._clock.now()
                self._update(conn, rollout, (row.site, row.node), committed_at=committed_at)
            fleet.append(
                NodeState(
                    row.site,
                    row.node,
                    row.ordered_at,
                    committed_at,
                    known.last_seen if known else None,
                    # An old failure of the same release is no news until the node says something else.
                    told.slot if told.slot != row.slot_before else "",
                    told.fault,
                )
            )
        return fleet

    def _told(self, report: Mapping[str, Any] | None, package: str, manifest: Manifest) -> Told:
        if report is None:
            return Told("", serves=False, fault="")
        slot = next((s["state"] for s in report["slots"] if s["package"] == package), "")
        if report["package"] != package:
            return Told(slot, serves=False, fault="")
        fault = self._fault(report, manifest)
        return Told(slot, serves=slot == "COMMITTED" and not fault, fault=fault)

    def _before(self, conn: Connection, name: NodeName, release: int) -> int:
        """The published release to send a node back to: what it serves, else what it was named, else the first."""
        published = self._repository.releases()
        report = self._report(conn, name)
        assigned = self._director.assignments().get(name)
        candidates = [report["release"] if report else 0, assigned.release if assigned else 0]
        return next((r for r in candidates if r in published and r != release), min(published))

    def _report(self, conn: Connection, name: NodeName) -> Mapping[str, Any] | None:
        here = (nodes.c.site == name[0]) & (nodes.c.node == name[1])
        found: Mapping[str, Any] | None = conn.execute(select(nodes.c.report).where(here)).scalar()
        return found

    def _order(self, conn: Connection, rollout: Row[Any], names: Sequence[NodeName]) -> None:
        package = self._package(rollout.release)
        manifest = self._repository.manifest(rollout.release)
        before = {(r.site, r.node): r.before for r in self._rows(conn, rollout)}
        changes: dict[NodeName, Named | None] = {}
        for name in names:
            changes[name] = Named(rollout.release, downgrade=before[name] > rollout.release)
            slot = self._told(self._report(conn, name), package, manifest).slot
            was = slot if slot in ("REFUSED", "ROLLED_BACK") else ""
            self._update(conn, rollout, name, ordered_at=self._clock.now(), slot_before=was)
        self._name(conn, changes)
        log.info("rollout.ordered", release=rollout.release, nodes=len(names))

    def _send_back(self, conn: Connection, rollout: Row[Any], names: Sequence[NodeName]) -> None:
        before = {(r.site, r.node): r.before for r in self._rows(conn, rollout)}
        self._name(conn, {n: Named(before[n], downgrade=True) for n in names})

    def _name(self, conn: Connection, changes: Mapping[NodeName, Named | None]) -> None:
        """Tells the director, then the nodes: a node that is quicker than the director would refuse the order."""
        self._director.assign(changes, self._repository.releases())
        for (site, node), named in changes.items():
            order = ReleaseOrder(named.release, self._package(named.release)) if named else None
            self._set_order(conn, site, node, order)

    def _end(self, conn: Connection, rollout: Row[Any], state: str, reason: str) -> None:
        conn.execute(
            update(rollouts)
            .where(rollouts.c.id == rollout.id)
            .values(state=state, reason=reason, ended_at=self._clock.now())
        )
        log.info("rollout.ended", release=rollout.release, state=state, reason=reason)

    def _update(self, conn: Connection, rollout: Row[Any], name: NodeName, **values: Any) -> None:
        conn.execute(
            update(rollout_nodes)
            .where(
                rollout_nodes.c.rollout == rollout.id,
                rollout_nodes.c.site == name[0],
                rollout_nodes.c.node == name[1],
            )
            .values(values)
        )

    def _rows(self, conn: Connection, rollout: Row[Any]) -> Sequence[Row[Any]]:
        mine = rollout_nodes.c.rollout == rollout.id
        return conn.execute(select(rollout_nodes).where(mine).order_by(rollout_nodes.c.position)).all()

    def _choose(self, conn: Connection, names: Sequence[NodeName] | None) -> list[NodeName]:
        inventory = [
            (row.site, row.node)
            for row in conn.execute(select(nodes.c.site, nodes.c.node).order_by(nodes.c.site, nodes.c.node))
        ]
        if names is None:
            return inventory
        unknown = [name for name in names if name not in inventory]
        if unknown:
            raise PeerError(f"Not in the inventory: {', '.join('/'.join(n) for n in unknown)}.")
        return list(dict.fromkeys(names))

    def _package(self, release: int) -> str:
        target = self._repository.releases().get(release)
        if target is None:
            raise PeerError(f"Release {release} is not published.", cure="Let the officers sign it, then publish it.")
        return read_note(target.custom).package
