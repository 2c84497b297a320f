"""What the demo prints: tables over what the fleet's own interfaces say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.uid import UID
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from models.heads import BY_NAME
from models.metrics import accuracy_interval, auc_interval
from scripts.lab.cases import Case
from scripts.lab.child import wait_until
from scripts.lab.fleet import Cloud, Fleet, Hospital
from shared.package.manifest import Manifest, decode_manifest

Answered = Sequence[tuple[Case, dict[str, Any]]]
MEGABYTE = 1e6


def answers(console: Console, found: Mapping[str, Answered], fleet: Fleet) -> None:
    """Prints a few answers a hospital and head, and what arrived back in the PACS for each."""
    table = Table(title="answers (research use only, not for diagnosis)", title_justify="left")
    for heading in ("hospital", "study", "truth", "answer", "probability", "stored to answer", "back in the PACS"):
        table.add_column(heading)
    for site, rows in found.items():
        for case, row in _few(rows):
            back = _returned(fleet, case.study)
            probability = row["reason"] or f"{row['probability']:.2f}"
            table.add_row(
                site, case.head, case.label, row["finding_name"] or "not assessed", probability,
                f"{stored_to_answer_ms(row):.0f} ms", back,
            )  # fmt: skip
    console.print(table)
    every = np.array([stored_to_answer_ms(row) for rows in found.values() for _, row in rows])
    p50, p95 = np.percentile(every, [50, 95])
    console.print(
        f"{len(every)} studies answered while all arrived at once; stored to answer p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    )


def stored_to_answer_ms(row: Mapping[str, Any]) -> float:
    """Returns the milliseconds from the last image on disk to the answer on record."""
    return float(row["answered_at"] - row["stored_at"]) * 1000


def tell_campaign(console: Console, row: dict[str, Any], told: set[str]) -> None:
    """Prints what is new in a campaign since the last look."""
    for around in row["rounds"]:
        verdict = around["verdict"]
        if verdict and around["id"] not in told:
            told.add(around["id"])
            reasons = "; ".join(verdict["reasons"])
            console.print(
                f"round {around['number']}: gate says [bold]{verdict['decision']}[/] ({verdict['strength']}): {reasons}"
            )
    now = f"{row['state']} {row['number']}"
    if now not in told:
        told.add(now)
        console.print(f"campaign: {row['state']}, round {row['number']}")


def watch_rollout(console: Console, fleet: Fleet, release: int, *, seconds: float) -> None:
    """Waits until every node itself reports that it serves the release, printing each step it reports."""
    page = fleet.cloud.page
    told: set[str] = set()

    def everywhere() -> bool:
        nodes = page.get("/api/nodes")
        for node in nodes:
            for slot in (node["report"] or {}).get("slots", []):
                step = f"{node['site']}: release {slot['release']} {slot['state']} {slot['reason']}".rstrip()
                if slot["release"] == release and step not in told:
                    told.add(step)
                    console.print(step)
        return all(
            node["report"]
            and node["report"]["release"] == release
            and any(s["release"] == release and s["state"] == "COMMITTED" for s in node["report"]["slots"])
            for node in nodes
        )

    wait_until(f"release {release} on every node", everywhere, seconds=seconds, every=0.5)
    for node in page.get("/api/nodes"):
        report = node["report"]
        console.print(
            f"{node['site']} serves release {report['release']}: pid {report['serving_pid']}, "
            f"weights {report['weights_loaded'][:12]}, golden {report['golden'][:12]}"
        )


def none_lost(
    console: Console,
    fleet: Fleet,
    sent: Mapping[str, Sequence[Case]],
    worklist: Callable[[Hospital], list[dict[str, Any]]],
) -> None:
    """Waits until every study sent during the rollout is answered; raises when one was refused or lost."""
    for hospital in fleet.hospitals:
        wanted = {case.study for case in sent[hospital.site]}
        rows: dict[str, int] = {}

        def answered(hospital: Hospital = hospital, wanted: set[str] = wanted, rows: dict[str, int] = rows) -> bool:
            rows.update({r["study"]: r["release"] for r in worklist(hospital) if r["study"] in wanted})
            return len(rows) == len(wanted)

        wait_until(f"{hospital.site}: every study sent during the rollout", answered, seconds=60, every=0.5)
        releases = ", ".join(f"{list(rows.values()).count(r)} by release {r}" for r in sorted(set(rows.values())))
        refused = hospital.sent - hospital.accepted
        console.print(
            f"{hospital.site}: {len(wanted)} studies during the rollout, {refused} refused, 0 lost; {releases}"
        )
        if refused:
            raise RuntimeError(f"{hospital.site} refused {refused} objects.")


def comparison(console: Console, before: Mapping[str, Answered], after: Mapping[str, Answered]) -> None:
    """Prints, per hospital, the held-out patients' AUC and balanced accuracy before and after."""
    table = Table(title="held-out patients, chest X-ray (95 % bootstrap over patients)", title_justify="left")
    for heading in ("hospital", "patients", "AUC before", "AUC after", "balanced accuracy before", "after"):
        table.add_column(heading)
    for site in before:
        cells = []
        for answered in (before[site], after[site]):
            scores, labels = _scores(answered)
            auc, balanced = auc_interval(scores, labels), accuracy_interval(scores, labels)
            cells.append([f"{x.value:.3f} ({x.low:.3f} to {x.high:.3f})" for x in (auc, balanced)])
        table.add_row(site, str(len(before[site])), cells[0][0], cells[1][0], cells[0][1], cells[1][1])
    console.print(table)


def moved(console: Console, fleet: Fleet) -> None:
    """Prints how far each part of the model moved, as the L2 norm of the change over that of the part."""
    old, new, manifest = _weights(fleet)
    parts: dict[str, list[str]] = {}
    for name in old:
        parts.setdefault(_part(name), []).append(name)
    table = Table(title="what moved", title_justify="left")
    for heading in ("part", "parameters", "trainable", "moved (relative L2)"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part, names in parts.items():
        before = np.concatenate([old[n].ravel() for n in names])
        after = np.concatenate([new[n].ravel() for n in names])
        share = np.linalg.norm(after - before) / np.linalg.norm(before)
        trainable = "yes" if any(n in manifest.trainable for n in names) else "no"
        table.add_row(part, f"{before.size:,}", trainable, f"{share:.4f}")
    console.print(table)
    console.print(f"{len(manifest.trainable)} trainable tensors of {len(old)}: {', '.join(manifest.trainable[:6])}, …")


def wire(console: Console, fleet: Fleet) -> None:
    """Prints the bytes that the broker logged per hospital beside the same knowledge sent as FP32."""
    old, _, manifest = _weights(fleet)
    trained = sum(old[n].size for n in manifest.trainable) * 4
    whole = sum(t.size for t in old.values()) * 4
    table = Table(title="bytes at the broker, up", title_justify="left")
    for heading in (
        "hospital",
        "updates",
        "features",
        "judgements",
        "reports",
        "rounds",
        "FP32 of trained",
        "ratio",
        "FP32 of all",
        "ratio ",
    ):
        table.add_column(heading, justify="left" if heading == "hospital" else "right")
    for site, stages in sorted(fleet.broker_bytes().items()):
        rounds = fleet.updates(site)
        update = stages.get("update", 0)
        each = update / rounds if rounds else float("nan")
        table.add_row(
            site, f"{update:,}", f"{stages.get('features', 0):,}", f"{stages.get('judgement', 0):,}",
            f"{stages.get('report', 0):,}", str(rounds), f"{trained:,} a round", f"{trained / each:.0f}x",
            f"{whole:,} a round", f"{whole / each:.0f}x",
        )  # fmt: skip
    console.print(table)


def seconds(console: Console, took: Mapping[str, float]) -> None:
    """Prints how long each stage took."""
    table = Table(title="seconds", title_justify="left")
    table.add_column("stage")
    table.add_column("s", justify="right")
    for name, value in took.items():
        table.add_row(name, f"{value:.1f}")
    table.add_row("whole run", f"{sum(took.values()):.1f}")
    console.print(table)


def addresses(console: Console, fleet: Fleet) -> None:
    """Prints where the pages are and who may sign in."""
    table = Table(title="pages", title_justify="left")
    for heading in ("page", "address", "name", "password of this run"):
        table.add_column(heading)
    for hospital in fleet.hospitals:
        table.add_row(f"reading, {hospital.site}", hospital.url, hospital.page.name, hospital.page.password)
    page = fleet.cloud.page
    table.add_row("fleet", page.url, page.name, page.password)
    console.print(table)
    console.print(f"The fleet page's certificate is signed by {fleet.cloud.state / 'pki' / 'ca.pem'}.")


def proposal(cloud: Cloud) -> tuple[int, Path]:
    """Returns the newest proposed release and the folder that officers sign."""
    folders = sorted((cloud.state / "registry" / "proposals").iterdir(), key=lambda p: p.stat().st_mtime)
    newest = max(r["release"] for r in cloud.page.get("/api/releases"))
    return newest, folders[-1]


def _few(rows: Answered) -> list[tuple[Case, dict[str, Any]]]:
    """Returns three radiographs and every series."""
    radiographs = [pair for pair in rows if pair[0].head == "chest-xray"]
    return radiographs[:3] + [pair for pair in rows if pair[0].head != "chest-xray"]


def _returned(fleet: Fleet, study: str) -> str:
    """Returns what the PACS holds of a study that the node made, waiting for both objects."""
    pacs = fleet.pacs
    found: list[str] = []

    def both() -> bool:
        found[:] = [
            UID(i.tags["SOPClassUID"]).name.removesuffix(" Storage") for i in pacs.instances(StudyInstanceUID=study)
        ]
        return len(found) >= 2

    wait_until(f"report and picture of {study}", both, seconds=60, every=0.25)
    return ", ".join(sorted(found))


def _scores(answered: Answered) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    classes = [c.name for c in BY_NAME["chest-xray"].classes]
    scores = np.array([[row["probabilities"][c] for c in classes] for _, row in answered])
    return scores, np.array([classes.index(case.label) for case, _ in answered])


def _weights(fleet: Fleet) -> tuple[dict[str, Any], dict[str, Any], Manifest]:
    releases = sorted(fleet.cloud.page.get("/api/releases"), key=lambda r: r["release"])
    loaded = []
    for release in (releases[0], releases[-1]):
        manifest = decode_manifest(fleet.cloud.blob(release["package"]).read_bytes())
        loaded.append(load_file(fleet.cloud.blob(manifest.file(manifest.weights).sha256)))
    as_float = [{name: t.astype(np.float32) for name, t in tensors.items()} for tensors in loaded]
    return as_float[0], as_float[1], manifest


def _part(name: str) -> str:
    words = name.split(".")
    return " ".join(words[:2]) if words[0] in {"stages", "blocks"} else words[0]
