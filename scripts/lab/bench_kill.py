"""SIGKILL at every system call of an association, over and over: how many acknowledged objects were lost (none may be).

The result is committed in docs/kill.json; `scripts/check` says when edge/intake has changed since.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.lab.door import Doors
from scripts.lab.kill import SIDES, choose, kill_at, steps, write_sending
from scripts.lab.table import Row, machine

SEEDS = 1000
ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "kill.json"


def measure(seeds: int = SEEDS) -> list[Row]:
    """Kills `seeds` doors, writes docs/kill.json, and returns its figures."""
    commit, doors, kills = intake_commit(), Doors(), []
    with tempfile.TemporaryDirectory(prefix="radfleet-kill-") as name:
        folder = Path(name)
        try:
            every = steps(doors, folder)
            senders = [write_sending(folder / f"sender{number}", number) for number in range(4)]
            for seed in range(seeds):
                step, count = choose(every, seed)
                kills.append(kill_at(doors, folder, step, senders[:count]))
        finally:
            doors.close()
    result = {
        "intake": commit,
        "seeds": seeds,
        "steps": len(every),
        "objects_of_a_sender": len(SIDES),
        "killed": sum(one.hit for one in kills),
        "killed_with_four_senders": sum(one.hit for one in kills if one.senders == 4),
        "acknowledged": sum(one.acknowledged for one in kills),
        "faults": [
            {"step": f"{one.step.name} {one.step.count}", "what": fault} for one in kills for fault in one.faults
        ],
        "machine": machine(),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return [
        Row("SIGKILL at a system call of an association", result["killed"], "doors killed", "asked for", seeds),
        Row("objects answered with Success before it", result["acknowledged"], "objects"),
        Row("of them lost, half, double, or not taken again", len(result["faults"]), "faults"),
    ]


def intake_commit() -> str:
    """Returns the last commit of edge/intake, with a + when the folder has changed since."""
    commit = _git("log", "-1", "--format=%h", "--abbrev=12", "--", "edge/intake")
    return commit + ("+" if _git("status", "--porcelain", "--", "edge/intake") else "")


def stale(result: dict[str, Any], commit: str) -> str:
    """Returns what is wrong with a committed result: that it is older than the code, or that it found faults."""
    if result["faults"]:
        return f"docs/kill.json has {len(result['faults'])} faults."
    if result["intake"] != commit:
        return (
            f"docs/kill.json was measured with edge/intake at {result['intake']}, it is at {commit} now. "
            "Cure: ./scripts/bench kill"
        )
    return ""


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":  # scripts/check
    found = stale(json.loads(RESULT.read_text()), intake_commit()) if RESULT.exists() else "docs/kill.json is missing."
    if found:
        print(f"warning: {found}", file=sys.stderr)
