"""Both corpora through a whole node by four senders that are not ours, and a table of what became of every file.

The result is committed in docs/corpora.md; the folders of objects are not a part of this repository.
"""

from __future__ import annotations

import re
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.data import data_folder
from scripts.lab.bench_kill import ROOT, intake_commit
from scripts.lab.child import wait_until
from scripts.lab.corpora import BESIDE, BOUND_S, CONFLICT, FAULTS, FETCHED, NO_UID, Fate, Item, corpus, send_all
from scripts.lab.expected import EXPECTED, NO_ADDRESS, allowed, became, departure, row_of
from scripts.lab.lone import LoneNode, lone_node
from scripts.lab.senders import FELL, NO_CONTEXT, NOT_SENT, OrthancSender, Sender, Web, by_dicom, storescu
from scripts.lab.table import Row, machine
from scripts.lab.tap import Tap

RESULT = ROOT / "docs" / "corpora.md"
READ_S = 120.0  # after the last file, until the pipeline has done all of them
STORESCU, ORTHANC, CURL, WGET = "storescu", "Orthanc", "curl", "wget"
_UNSENT = (NOT_SENT, FELL, NO_CONTEXT)
_KEPT_BUT = (NO_UID, BESIDE, CONFLICT)


@dataclass(frozen=True)
class Run:
    """What became of every file by one sender, and of the node.

    `work` and `reasons` are the pipeline's: by digest what it made of an object, and why it quarantined one. `died`
    counts processes of the node that were there before and not after, and children that the log says were replaced.
    """

    sender: str
    fates: list[Fate]
    work: dict[str, str]
    reasons: dict[str, str]
    died: int
    waiting: int  # objects that the pipeline has not done READ_S after the last file

    @property
    def came(self) -> list[Fate]:
        """The files that came to the node at all."""
        return [fate for fate in self.fates if fate.outcome not in _UNSENT]


def measure() -> list[Row]:
    """Sends every file by each sender, writes docs/corpora.md and returns the totals.

    Nothing where the folders of objects are not on this machine (RADFLEET_DATA).
    """
    data = data_folder()
    if data is None or not (data / "dicom").is_dir():
        return []
    items, commit = corpus(data), intake_commit()
    runs = [_run(items, sender) for sender in (STORESCU, ORTHANC, CURL)]
    by_dimse = {fate.item.path for run in runs[:2] for fate in run.came}
    runs.append(_run([item for item in items if item.path not in by_dimse], WGET))
    RESULT.write_text("".join(_document(items, runs, commit)))
    rows = []
    for run in runs:
        totals = Counter(fate.outcome for fate in run.fates)
        rows += [
            Row(f"{run.sender}: {name}", count, f"of {len(run.fates)} files") for name, count in totals.most_common()
        ]
        rows.append(Row(f"{run.sender}: the slowest answer", _slowest(run), "s"))
    return rows


def _run(items: Sequence[Item], sender: str) -> Run:
    with tempfile.TemporaryDirectory(prefix="radfleet-corpora-") as name:
        folder = Path(name)
        state = folder / "state"
        with lone_node(folder) as node:
            web = Web(node.page.url, node.page.token, folder)
            with _sending(sender, node, web, folder) as send:
                before = node.process_ids()
                fates = send_all(items, send, state, web)
            with suppress(TimeoutError):
                wait_until("the pipeline to be done", lambda: _unread(state) == 0, seconds=READ_S, every=1.0)
            waiting = _unread(state)
            died = len(set(before) - set(node.process_ids()))
            died += (folder / "pipeline.log").read_text().count("imaging.child_died")
        work = dict(_ask(state / "results.sqlite", "SELECT digest, outcome FROM work"))
        reasons = dict(_ask(state / "results.sqlite", "SELECT digest, reason FROM quarantine"))
    return Run(sender, fates, work, reasons, died, waiting)


@contextmanager
def _sending(sender: str, node: LoneNode, web: Web, folder: Path) -> Iterator[Sender]:
    by_http: dict[str, Sender] = {CURL: web.curl, WGET: web.wget}
    if sender in by_http:
        yield by_http[sender]
        return
    with closing(Tap(node.dicom_port)) as tap:
        if sender == STORESCU:
            yield by_dicom(tap, storescu)
            return
        with closing(OrthancSender(folder / "orthanc", tap.port)) as orthanc:
            yield by_dicom(tap, orthanc.send)


def _unread(state: Path) -> int:
    kept = _ask(state / "intake.sqlite", "SELECT digest FROM objects WHERE state = 'kept'")
    return len(set(kept) - set(_ask(state / "results.sqlite", "SELECT digest FROM work WHERE outcome <> ''")))


def _ask(database: Path, question: str) -> list[Any]:
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        return connection.execute(question).fetchall()


def _document(items: Sequence[Item], runs: Sequence[Run], commit: str) -> Iterator[str]:
    yield (
        "# Both corpora, through a whole node\n\n"
        "Written by `./scripts/bench corpora`; research use only, not for diagnosis. Every file of the folders\n"
        "`dicom` (real objects) and `dicom_hostile` is sent to a node (door, pipeline and page, each a process) by\n"
        "programs that share no code with Radfleet: DCMTK's `storescu` and Orthanc by C-STORE, `curl` by STOW-RS,\n"
        "and `wget` by STOW-RS where neither of the first two could send the file. What was stored is fetched back\n"
        "at once by WADO-RS with `curl` (`transfer-syntax=*`), and its data set compared, byte for byte, with the\n"
        "one that the sender put on the wire. What was refused is compared, byte for byte, with what the quarantine\n"
        "holds.\n\n"
        f"edge/intake at {commit}, {machine()['measured'][:10]}.\n"
    )
    yield from _summary(runs)
    yield from _reached(items, runs)
    yield from _expectations(runs)
    for run in runs:
        yield from _categories(run)


def _summary(runs: Sequence[Run]) -> Iterator[str]:
    faults = sum(fate.outcome in FAULTS for run in runs for fate in run.fates)
    yield "\n## What became of them\n\n| | " + " | ".join(run.sender for run in runs) + " |\n"
    yield "|---|" + "---:|" * len(runs) + "\n"
    lines: list[tuple[str, Callable[[Run], object]]] = [
        ("files", lambda run: len(run.fates)),
        ("the sender refuses the file, or falls over it", lambda run: len(run.fates) - len(run.came)),
        ("stored, fetched back identical", lambda run: _count(run, FETCHED)),
        ("kept beside another object of the same UIDs, which is shown", lambda run: _count(run, BESIDE)),
        ("kept beside in identity conflict, listed on the page", lambda run: _count(run, CONFLICT)),
        ("kept without study or series UID, quarantined by imaging", lambda run: _count(run, NO_UID)),
        ("refused, with a reason, the same bytes in the quarantine", _refused),
        ("lost, changed, unanswered, or with another status", lambda run: sum(_count(run, one) for one in FAULTS)),
        ("slowest answer to a message or a request, s", lambda run: f"{_slowest(run):.2f}"),
        ("slowest retrieval, s", lambda run: f"{max(fate.fetch_s for fate in run.fates):.2f}"),
        ("processes of the node that died", lambda run: run.died),
        ("objects that the pipeline left waiting", lambda run: run.waiting),
    ]
    yield from (f"| {name} | {' | '.join(str(value(run)) for run in runs)} |\n" for name, value in lines)
    yield (
        "\nWhat WADO-RS does not give (another object of the same UIDs is shown, or there is no UID to ask for) lies\n"
        f"in the spool with the very bytes. Faults of the node: {faults}. An answer may take {BOUND_S:g} s here.\n"
    )


def _reached(items: Sequence[Item], runs: Sequence[Run]) -> Iterator[str]:
    senders = Counter(fate.item.path for run in runs for fate in run.came)
    counts = Counter(senders[item.path] for item in items)
    said = ", ".join(f"{count} files by {number} programs" for number, count in sorted(counts.items(), reverse=True))
    yield f"\nHow many foreign programs brought a file to the node: {said}.\n"


def _expectations(runs: Sequence[Run]) -> Iterator[str]:
    yield (
        "\n## What the manifest expects of the hostile files\n\n"
        "Each note of the manifest is read as outcomes that answer to it (`scripts/lab/expected.py`). *kept*: fetched\n"
        "back or kept beside, and no model answered; *unread*: kept, and quarantined by imaging with a reason; the\n"
        "others are the door's reasons. Files by all senders, and how many had such an outcome.\n\n"
        "| note in the manifest | asks for | files | met | differ, explained | differ |\n"
        "|---|---|---:|---:|---:|---:|\n"
    )
    met: Counter[str] = Counter()
    explained: Counter[str] = Counter()
    other: Counter[str] = Counter()
    why: dict[str, Counter[str]] = {}
    unexplained = []
    for run in runs:
        for fate in run.came:
            outcome, note = became(fate, run.work), row_of(fate.item)
            reason = departure(fate.item, outcome)
            if outcome in allowed(fate.item):
                met[note] += 1
            elif reason:
                explained[note] += 1
                why.setdefault(f"{outcome}: {reason}", Counter())[fate.item.path.name] += 1
            else:
                other[note] += 1
                unexplained.append(f"| `{fate.item.path.name}` | {run.sender} | {fate.item.expected} | {outcome} |\n")
    for note, meaning, outcomes in EXPECTED:
        total = met[note] + explained[note] + other[note]
        numbers = f"{total} | {met[note]} | {explained[note] or ''} | {other[note] or ''}"
        yield f"| {meaning} | {', '.join(sorted(outcomes))} | {numbers} |\n"
    yield "\nWhere an outcome is another one than the note asks for, why it stays so:\n\n"
    yield "| outcome and why | files |\n|---|---|\n"
    for text, names in sorted(why.items()):
        yield f"| {text} | {', '.join(f'`{name}`' for name in sorted(names))} |\n"
    if unexplained:
        yield "\nNot explained:\n\n| file | sender | note | outcome |\n|---|---|---|---|\n"
        yield from unexplained


def _categories(run: Run) -> Iterator[str]:
    found = {fate.outcome for fate in run.fates}
    columns = [one for one in (FETCHED, *_KEPT_BUT, *_UNSENT) if one in found]
    columns += sorted(found - set(columns))
    yield f"\n## {run.sender}\n\n| category | files | {' | '.join(map(_heading, columns))} | imaging |\n"
    yield "|---|" + "---:|" * (len(columns) + 2) + "\n"
    groups: dict[str, list[Fate]] = {}
    for fate in run.fates:
        groups.setdefault(fate.item.category, []).append(fate)
    for category, group in [*groups.items(), ("**all**", run.fates)]:
        counts = Counter(fate.outcome for fate in group)
        unread = sum(fate.digest in run.reasons for fate in group)
        cells = [str(counts[one] or "") for one in columns]
        yield f"| {category} | {len(group)} | {' | '.join(cells)} | {unread or ''} |\n"
    yield "\nWhy the door refused, and why imaging quarantined what was stored:\n\n| reason | files |\n|---|---:|\n"
    why = Counter(f"{fate.outcome}: {_reason(fate.reason)}" for fate in run.fates if fate.reason)
    why += Counter(f"imaging: {_reason(run.reasons[fate.digest])}" for fate in run.fates if fate.digest in run.reasons)
    yield from (f"| {reason} | {count} |\n" for reason, count in why.most_common())
    for outcome in (NO_ADDRESS, *FAULTS, *_UNSENT):
        names = sorted(fate.item.path.name for fate in run.fates if fate.outcome == outcome)
        if names:
            yield f"\n<details><summary>{run.sender}, {outcome}: {len(names)} files</summary>\n\n"
            yield ", ".join(f"`{name}`" for name in names) + "\n\n</details>\n"


def _count(run: Run, outcome: str) -> int:
    return sum(fate.outcome == outcome for fate in run.fates)


def _refused(run: Run) -> int:
    return sum(_is_refusal(fate.outcome) for fate in run.fates)


def _slowest(run: Run) -> float:
    return max(fate.answer_s for fate in run.fates)


def _is_refusal(outcome: str) -> bool:
    return outcome not in {FETCHED, *_KEPT_BUT, *_UNSENT, *FAULTS}


def _heading(outcome: str) -> str:
    return f"door: {outcome}" if _is_refusal(outcome) else outcome


def _reason(text: str) -> str:
    """A reason without the numbers of the one object."""
    return re.sub(r"\d+(\.\d+)*", "N", text)[:90].replace("|", "/")
