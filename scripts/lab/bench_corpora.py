"""Both corpora through a whole node by two senders that are not ours, and a table of what became of every file.

The result is committed in docs/corpora.md; the folders of objects are not a part of this repository.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from models.data import data_folder
from scripts.lab.bench_kill import ROOT, intake_commit
from scripts.lab.child import wait_until
from scripts.lab.corpora import (
    FELL,
    LOST,
    NO_ANSWER,
    NO_CONTEXT,
    NOT_SENT,
    STORED,
    Fate,
    Item,
    OrthancSender,
    corpus,
    send_all,
    storescu,
)
from scripts.lab.lone import lone_node
from scripts.lab.table import Row, machine
from scripts.lab.tap import Tap

RESULT = ROOT / "docs" / "corpora.md"
READ_S = 1200.0


def measure() -> list[Row]:
    """Sends every file by each sender, writes docs/corpora.md and returns the totals.

    Nothing where the folders of objects are not on this machine (RADFLEET_DATA).
    """
    data = data_folder()
    if data is None or not (data / "dicom").is_dir():
        return []
    items, commit = corpus(data), intake_commit()
    parts, rows = [], []
    for sender in ("DCMTK storescu", "Orthanc"):
        fates, reasons = _through_a_node(items, sender)
        parts.append(_table(sender, fates, reasons))
        totals = Counter(_kind(fate.outcome) for fate in fates)
        rows += [Row(f"{sender}: {name}", count, f"of {len(items)} files") for name, count in totals.most_common()]
    head = (
        "# Both corpora, through a whole node\n\n"
        "Written by `scripts/bench corpora`; research use only, not for diagnosis. Every file of the folders\n"
        "`dicom` (real objects) and `dicom_hostile` is sent by a sender that shares no code with Radfleet.\n"
        "*stored*: the spool holds, byte for byte, the data set that the sender put on the wire. *door*: answered\n"
        "with a failure, the same bytes are in the quarantine. *imaging*: stored, and the pipeline could not read\n"
        "it; it is on the page with its reason. No file ended a process of the node, every request was answered.\n\n"
        f"edge/intake at {commit}, {machine()['measured'][:10]}.\n"
    )
    RESULT.write_text(head + "".join(parts))
    return rows


def _through_a_node(items: Sequence[Item], sender: str) -> tuple[list[Fate], dict[str, str]]:
    """Returns each file's fate, and by digest why imaging quarantined an object."""
    with tempfile.TemporaryDirectory(prefix="radfleet-corpora-") as name:
        folder = Path(name)
        with lone_node(folder) as node:
            tap = Tap(node.dicom_port)
            try:
                if sender == "Orthanc":
                    orthanc = OrthancSender(folder / "orthanc", tap.port)
                    try:
                        fates = send_all(items, tap, orthanc.send, folder / "state")
                    finally:
                        orthanc.close()
                else:
                    fates = send_all(items, tap, storescu, folder / "state")
            finally:
                tap.close()
            wait_until("the pipeline to be done", lambda: _unread(folder / "state") == 0, seconds=READ_S, every=1.0)
        results = sqlite3.connect(folder / "state" / "results.sqlite")
        reasons = dict(results.execute("SELECT digest, reason FROM quarantine").fetchall())
        results.close()
    return fates, reasons


def _unread(state: Path) -> int:
    database = sqlite3.connect(f"file:{state / 'intake.sqlite'}?mode=ro", uri=True, timeout=30)
    kept = {row[0] for row in database.execute("SELECT digest FROM objects WHERE state = 'kept'")}
    database.close()
    database = sqlite3.connect(f"file:{state / 'results.sqlite'}?mode=ro", uri=True, timeout=30)
    done = {row[0] for row in database.execute("SELECT digest FROM work WHERE outcome <> ''")}
    database.close()
    return len(kept - done)


def _kind(outcome: str) -> str:
    return outcome if outcome in (STORED, NOT_SENT, FELL, NO_CONTEXT, NO_ANSWER) or outcome[:3] == LOST[:3] else "door"


def _table(sender: str, fates: Sequence[Fate], reasons: dict[str, str]) -> str:
    found = {fate.outcome for fate in fates}
    columns = [one for one in (STORED, NOT_SENT, FELL, NO_CONTEXT) if one in found]
    columns += sorted(found - set(columns))
    lines = [
        f"\n## {sender}\n\n",
        f"| category | files | {' | '.join(_heading(one) for one in columns)} | imaging |\n",
        "|---|" + "---:|" * (len(columns) + 2) + "\n",
    ]
    groups: dict[str, list[Fate]] = {}
    for fate in fates:
        groups.setdefault(fate.item.category, []).append(fate)
    for category, group in [*groups.items(), ("**all**", list(fates))]:
        counts = Counter(fate.outcome for fate in group)
        unread = sum(fate.outcome == STORED and fate.digest in reasons for fate in group)
        cells = [str(counts[one] or "") for one in columns]
        lines.append(f"| {category} | {len(group)} | {' | '.join(cells)} | {unread or ''} |\n")
    lines.append("\nWhy imaging quarantined what was stored:\n\n| reason | files |\n|---|---:|\n")
    why = Counter(_reason(reasons[fate.digest]) for fate in fates if fate.outcome == STORED and fate.digest in reasons)
    lines += [f"| {reason} | {count} |\n" for reason, count in why.most_common()]
    for outcome in (NOT_SENT, FELL):
        names = sorted(fate.item.path.name for fate in fates if fate.outcome == outcome)
        if names:
            lines.append(f"\n<details><summary>{sender}, {outcome}: {len(names)} files</summary>\n\n")
            lines.append(", ".join(f"`{name}`" for name in names) + "\n\n</details>\n")
    return "".join(lines)


def _heading(outcome: str) -> str:
    return outcome if _kind(outcome) == outcome else f"door: {outcome}"


def _reason(text: str) -> str:
    """A reason without the numbers of the one object."""
    return re.sub(r"\d+(\.\d+)*", "N", text)[:90].replace("|", "/")
