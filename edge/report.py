"""What the node really does, gathered from the files of its processes for the cloud and for `status`."""

from __future__ import annotations

import importlib.metadata
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from msgspec import Struct

from edge.sqlite import open_foreign
from shared.wire.records import NodeReport, SlotReport


class RoomState(Struct, frozen=True):
    """How full the spool is, as the intake process last said (edge.intake.room)."""

    used_bytes: int
    capacity_bytes: int
    level: str  # "", "warning" or "full"
    held: dict[str, int]  # objects whose time is over, by what they wait for

    @property
    def text(self) -> str:
        """One line for people."""
        share = self.used_bytes / self.capacity_bytes if self.capacity_bytes else 1.0
        means = {"warning": ": objects leave early", "full": ": senders are refused"}.get(self.level, "")
        held = ", ".join(f"{count} {why}" for why, count in sorted(self.held.items()))
        waiting = f"; kept on: {held}" if held else ""
        return f"{share:.0%} of {self.capacity_bytes / 1e9:.1f} GB{means}{waiting}"


def node_report(state: Path, slots: list[SlotReport], *, clock_trusted: bool) -> NodeReport:
    """Returns the node's report; what does not exist yet counts zero.

    The serving fields are those that the serving process itself wrote after its golden proof.
    """
    results, outbox = state / "results.sqlite", state / "outbox.sqlite"
    serving = next(iter(_rows(results, "SELECT * FROM serving")), {})
    return NodeReport(
        version=importlib.metadata.version("radfleet"),
        package=str(serving.get("package", "")),
        release=int(serving.get("release", 0)),
        variant=str(serving.get("variant", "")),
        weights_loaded=str(serving.get("weights_loaded", "")),
        golden=str(serving.get("golden", "")),
        serving_pid=int(serving.get("pid", 0)),
        provider=str(serving.get("provider", "")),
        slots=slots,
        studies=_count(results, "SELECT COUNT(*) AS n FROM answers WHERE latest = 1"),
        quarantined=_count(results, "SELECT COUNT(*) AS n FROM quarantine"),
        labelled=_count(state / "labels.sqlite", "SELECT COUNT(DISTINCT answer_id) AS n FROM labels"),
        outbox_waiting=_count(outbox, "SELECT COUNT(*) AS n FROM messages WHERE state = 'waiting'"),
        outbox_expired=_count(outbox, "SELECT COALESCE(SUM(n), 0) AS n FROM counts WHERE what = 'expired'"),
        clock_trusted=clock_trusted,
    )


def link_state(state: Path) -> str:
    """Returns `connected`, or why the link to the cloud is not; empty before the uplink said anything."""
    rows = _rows(state / "outbox.sqlite", "SELECT value FROM facts WHERE name = 'link'")
    return next((str(row["value"]) for row in rows), "")


def degraded_reason(state: Path) -> str:
    """Returns why the serving process runs slower or less exactly than it could; empty when it does not."""
    rows = _rows(state / "results.sqlite", "SELECT * FROM serving")
    return next((str(row.get("degraded", "")) for row in rows), "")


def room_state(state: Path) -> RoomState | None:
    """Returns how full the spool is; None before the intake process said anything."""
    index = state / "intake.sqlite"
    if not _rows(index, "SELECT 1 FROM sqlite_master WHERE name = 'room'"):
        return None  # an older version's
    for row in _rows(index, "SELECT * FROM room"):
        return RoomState(row["used_bytes"], row["capacity_bytes"], row["level"], json.loads(row["held"]))
    return None


def withheld_count(state: Path) -> int:
    """Returns how many confirmed cases are kept out of learning."""
    return _count(state / "cases" / "cases.sqlite", "SELECT COUNT(*) AS n FROM withheld")


def _count(path: Path, question: str) -> int:
    return next((int(row["n"]) for row in _rows(path, question)), 0)


def _rows(path: Path, question: str) -> list[dict[str, Any]]:
    database = open_foreign(path)
    if database is None:
        return []
    with closing(database):
        return [dict(row) for row in database.execute(question)]
