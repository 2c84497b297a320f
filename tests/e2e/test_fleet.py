"""A whole fleet of real parts: what comes back, what is served, what survives SIGKILL, and what never leaves."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pydicom
import pytest

from edge.uplink.outbox import drop
from scripts.lab.cases import Case, Source, draw_cases
from scripts.lab.child import Child, wait_until
from scripts.lab.fleet import BIN, Fleet, Hospital
from scripts.lab.modality import store
from shared.files import sha256_file
from shared.package.manifest import MANIFEST_NAME, decode_manifest
from shared.wire.records import NodeReport

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
CANARY_NAME, CANARY_ID, CANARY_ACCESSION = "Canarywing^Tweetina", "CANARY-77-ID", "CANARYACC7"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    made = Fleet(tmp_path_factory.mktemp("fleet"))
    try:
        made.found()
        made.start_pacs()
        made.enrol("hospital-a")
        made.hospitals[0].wait_ready()
        yield made
    finally:
        made.stop()


@pytest.fixture
def hospital(fleet: Fleet) -> Hospital:
    return fleet.hospitals[0]


def cases(folder: Path, purpose: str, count: int, sections: int = 0) -> list[Case]:
    folder = folder / purpose
    folder.mkdir()
    return draw_cases(
        Source(None), folder, scanner="A", purpose=purpose, radiographs=count, sections=sections, slices=4
    )


def send(hospital: Hospital, studies: list[Case]) -> None:
    files = [file for case in studies for file in case.files]
    assert store(files, port=hospital.dicom_port, called="RADFLEET").accepted == len(files)


def answers(hospital: Hospital, studies: list[Case], seconds: float = 60) -> dict[str, dict[str, Any]]:
    """Returns the worklist row of each study, waiting until there is one for all."""
    wanted = {case.study for case in studies}
    found: dict[str, dict[str, Any]] = {}

    def all_there() -> bool:
        found.update({row["study"]: row for row in hospital.page.get("/api/worklist") if row["study"] in wanted})
        return len(found) == len(wanted)

    wait_until("answers", all_there, seconds=seconds, every=0.25)
    return found


def returned(fleet: Fleet, study: str) -> list[str]:
    return sorted(instance.tags["Modality"] for instance in fleet.pacs.instances(StudyInstanceUID=study))


def confirm(hospital: Hospital, studies: list[Case], rows: dict[str, dict[str, Any]]) -> None:
    for case in studies:
        hospital.page.post(f"/api/answers/{rows[case.study]['answer']}/label", label=case.label)


def test_every_kind_of_study_comes_back_as_report_and_picture(fleet: Fleet, hospital: Hospital, tmp_path: Path) -> None:
    studies = cases(tmp_path, "kinds", 2, sections=1)
    send(hospital, studies)
    rows = answers(hospital, studies)
    assert {row["head"] for row in rows.values()} == {"chest-xray", "chest-ct", "brain-mri"}
    for case in studies:
        wait_until("report and picture", lambda case=case: len(returned(fleet, case.study)) == 2, seconds=60)
        assert returned(fleet, case.study) == ["OT", "SR"]


def test_the_serving_process_itself_proves_what_it_serves(fleet: Fleet, hospital: Hospital) -> None:
    def reported() -> bool:
        return bool(fleet.cloud.page.get("/api/nodes")[0]["report"])

    wait_until("the node's report", reported, seconds=90)
    report = fleet.cloud.page.get("/api/nodes")[0]["report"]
    command = Path(f"/proc/{report['serving_pid']}/cmdline").read_bytes()
    assert b"pipeline" in command
    assert str(hospital.config).encode() in command
    package = hospital.state / "models" / report["package"]
    manifest = decode_manifest((package / MANIFEST_NAME).read_bytes())
    assert report["weights_loaded"] == sha256_file(package / manifest.variant(report["variant"]).file)
    assert len(report["golden"]) == 64


def test_sigkill_of_every_part_loses_and_doubles_nothing(fleet: Fleet, hospital: Hospital, tmp_path: Path) -> None:
    rng = random.Random(4)
    studies = cases(tmp_path, "kill", 24)
    features_before = fleet.features("hospital-a")
    rows: dict[str, dict[str, Any]] = {}
    for start in range(0, len(studies), 6):
        batch = studies[start : start + 6]
        send(hospital, batch)  # answered with Success: from here on it is our promise
        victim = ("edge", "broker", "redis", "cloud")[start // 6]
        if victim == "edge":
            restart(hospital.child, (hospital.state / "run" / "ready.json"))
        rows |= answers(hospital, batch)
        confirm(hospital, batch, rows)
        wait_until("some of it on its way", lambda: rng.random() < 0.2, seconds=5)
        if victim == "broker":
            restart(fleet.mosquitto)
        elif victim == "redis":
            assert fleet.redis
            restart(fleet.redis.child)
        elif victim == "cloud":
            restart(fleet.cloud.child, fleet.cloud.state / "run" / "ready.json")

    expected = features_before + len(studies)
    wait_until("all features", lambda: fleet.features("hospital-a") >= expected, seconds=120, every=0.5)
    assert fleet.features("hospital-a") == expected
    for case in studies:
        wait_until("report and picture", lambda case=case: len(returned(fleet, case.study)) >= 2, seconds=60)
        assert returned(fleet, case.study) == ["OT", "SR"]
    assert fleet.cloud.ask("SELECT count(*) FROM refusals") == [(0,)]
    # A receipt that was lost with Redis or the broker comes when the node asks again.
    wait_until("a verdict on every message", lambda: outbox_states(hospital) <= {"accepted", "duplicate"}, seconds=90)


def outbox_states(hospital: Hospital) -> set[str]:
    with closing(sqlite3.connect(f"file:{hospital.state / 'outbox.sqlite'}?mode=ro", uri=True)) as outbox:
        return {row[0] for row in outbox.execute("SELECT DISTINCT state FROM messages WHERE stage = 'features'")}


def restart(child: Child | None, ready: Path | None = None) -> None:
    """SIGKILL, then the same command again."""
    assert child
    child.kill()
    if ready:
        ready.unlink(missing_ok=True)
    child.restart()
    if ready:
        child.wait_ready("the restart", ready.exists, seconds=120)


def canary(folder: Path) -> tuple[Case, list[bytes]]:
    """Returns a study under a name that exists nowhere else, and everything of it that must not be found."""
    case = cases(folder, "canary", 1)[0]
    ds = pydicom.dcmread(case.files[0])
    ds.PatientName, ds.PatientID, ds.AccessionNumber = CANARY_NAME, CANARY_ID, CANARY_ACCESSION
    ds.save_as(case.files[0], enforce_file_format=True)
    row = ds.pixel_array[ds.Rows // 2].tobytes()  # a row through the middle of the chest
    words = [CANARY_NAME, CANARY_NAME.split("^", maxsplit=1)[0], CANARY_ID, CANARY_ACCESSION]
    words += [str(ds.SOPInstanceUID), str(ds.StudyInstanceUID), str(ds.SeriesInstanceUID)]
    return case, [word.encode() for word in words] + [row, row[:64]]


def search(folder: Path, needles: list[bytes]) -> list[tuple[str, bytes]]:
    """Returns (file, needle) for every needle in every file below `folder`."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [(path.name, needle) for needle in needles if needle in data]
    return found


def test_no_patient_is_in_anything_that_leaves_and_a_planted_leak_is_found(
    fleet: Fleet, hospital: Hospital, tmp_path: Path
) -> None:
    case, needles = canary(tmp_path)
    before = fleet.features("hospital-a")
    drops = hospital.state / "outbox" / "drop"
    assert hospital.child
    hospital.child.stop()
    # Without `uplink` every message stays in the drop folder as it is before it is sealed.
    parts = []
    for name in ("intake", "pipeline", "web"):
        command = [BIN / "radfleet-edge", "run", "--only", name, "--config", hospital.config]
        parts.append(Child(name, command, log=tmp_path / f"{name}.log"))
    try:
        wait_until(
            "the door", lambda: store(list(case.files), port=hospital.dicom_port, called="RADFLEET").accepted == 1
        )
        wait_until("the page", hospital.page.answers, seconds=60)
        confirm(hospital, [case], answers(hospital, [case]))
        wait_until("the features before sealing", lambda: any(drops.glob("*features*")), seconds=60)
        assert search(hospital.state / "spool", needles)  # the search finds what is there
        assert search(drops, needles) == []
    finally:
        for part in parts:
            part.stop()
    hospital.start()
    wait_until("the features in the cloud", lambda: fleet.features("hospital-a") == before + 1, seconds=90, every=0.5)
    assert search(fleet.cloud.state, needles) == []

    leak = NodeReport(CANARY_NAME, "", 0, "", "", "", 0, "", [], 0, 0, 0, 0, 0, clock_trusted=True)
    drop(drops, "report", leak, name=f"planted-{os.getpid()}")
    wait_until("the planted leak", lambda: search(fleet.cloud.state, needles) != [], seconds=60, every=0.5)
