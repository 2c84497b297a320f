"""`radfleet-edge export`, and what burned-in text does to a confirmed case."""

from __future__ import annotations

import sqlite3
from io import StringIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import ComprehensiveSRStorage, UltrasoundImageStorage
from rich.console import Console

import edge.cli
from edge.config import TEMPLATE
from edge.imaging.pseudonym import mapped_uid
from edge.results import reading
from edge.results.cases import CaseStore
from edge.results.documents import Builder
from edge.results.tables import AnswerRecord
from shared.console import run_cli
from shared.files import atomic_write
from tests.edge.test_burned_in import image, speckle, written
from tests.edge.test_deidentify import ct
from tests.edge.test_pipeline import Dropped, Node, confirm
from tests.simulators.modality import phantom_study
from tests.simulators.node import SITE_KEY
from tests.simulators.reading import PASSWORD, ReadingNode

CANARY = "ZZCANARY-7"
STUDY = "1.2.826.777777.5"


def exported(folder: Path, study: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Runs the command line; returns its exit status and what it printed."""
    told = StringIO()
    monkeypatch.setattr(edge.cli, "out", Console(file=told, width=200, highlight=False))
    line = ["radfleet-edge", "export", "--study", study, "--to", str(folder / "to"), "-c", str(folder / "edge.toml")]
    monkeypatch.setattr("sys.argv", line)
    with pytest.raises(SystemExit) as ended:
        run_cli(edge.cli.app)
    return int(ended.value.code or 0), told.getvalue()


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node with a configuration, a key, and one study: a CT image and an ultrasound image with writing on it."""
    (tmp_path / "edge.toml").write_text(TEMPLATE)
    node = Node(tmp_path / "state")
    atomic_write(tmp_path / "state" / "site.key", SITE_KEY)
    one, two = ct(), image(written(speckle())[0], UltrasoundImageStorage, SOPInstanceUID="1.2.3.4.9")
    for item in (one, two):
        item.StudyInstanceUID, item.PatientName, item.PatientID = STUDY, f"{CANARY}^Eva", CANARY
    node.put([one, two])
    return node


def test_a_study_is_written_deidentified_and_again_without_harm(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, told = exported(tmp_path, STUDY, monkeypatch)
    assert status == 0, told
    files = sorted((tmp_path / "to").iterdir())
    assert len(files) == 2
    assert "places blacked" in told
    assert "2 written, 0 refused. Research use only, not for diagnosis." in told
    for path in files:
        data = path.read_bytes()
        assert CANARY.encode() not in data
        assert pydicom.dcmread(path).StudyInstanceUID == mapped_uid(SITE_KEY, STUDY)
    before = {path: path.read_bytes() for path in files}
    assert exported(tmp_path, STUDY, monkeypatch)[0] == 0
    assert {path: path.read_bytes() for path in sorted((tmp_path / "to").iterdir())} == before
    assert CANARY not in told


def test_nothing_is_overwritten(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "to" / f"{mapped_uid(SITE_KEY, '1.2.3.4.1')}.dcm"
    there.parent.mkdir()
    there.write_bytes(b"somebody's work")
    status, told = exported(tmp_path, STUDY, monkeypatch)
    assert status == 65
    assert "stands in the folder with other bytes" in told
    assert there.read_bytes() == b"somebody's work"
    assert len(list(there.parent.iterdir())) == 2


def test_one_refused_object_is_named_and_ends_with_65(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = ct()
    report.SOPClassUID, report.SOPInstanceUID, report.StudyInstanceUID = ComprehensiveSRStorage, "1.2.3.4.8", STUDY
    report.file_meta.MediaStorageSOPClassUID, report.file_meta.MediaStorageSOPInstanceUID = (
        ComprehensiveSRStorage,
        "1.2.3.4.8",
    )
    node.put([report])
    status, told = exported(tmp_path, STUDY, monkeypatch)
    assert status == 65
    assert "refused: The object is a structured report: its content is not cleaned." in told
    assert "2 written, 1 refused" in told


def test_what_is_not_kept_any_more_is_refused(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(node.state / "intake.sqlite") as index:
        index.execute("UPDATE objects SET state = 'identity_conflict' WHERE sop_instance = '1.2.3.4.1'")
        file = index.execute("SELECT file FROM objects WHERE sop_instance = '1.2.3.4.9'").fetchone()[0]
    (node.state / "spool" / file).unlink()
    status, told = exported(tmp_path, STUDY, monkeypatch)
    assert status == 65
    assert "Its state is identity conflict." in told
    assert "cannot be read from the spool" in told
    assert not list((tmp_path / "to").iterdir())


def test_a_study_that_is_not_here_is_an_error_with_a_cure(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exported(tmp_path, "1.2.3", monkeypatch)[0] == 65
    assert "Cure: Check the Study Instance UID." in capsys.readouterr().err


# -- learning ----------------------------------------------------------------------------------------------------


def writing(header: str) -> pydicom.Dataset:
    """A radiograph with a name written into its pixels, and what its header says of that."""
    item = phantom_study("chest-xray", 1, seed=11)[0]
    grey = item.pixel_array.astype(np.float32)
    frames, _ = written((grey * (200 / grey.max())).astype(np.uint8)[None])
    item.PixelData = (frames[0].astype("<u2") * 16).tobytes()
    item.BurnedInAnnotation = header
    if not header:
        del item.BurnedInAnnotation
    return item


def answered(node: Node, item: pydicom.Dataset) -> AnswerRecord:
    """The answer to an image, confirmed by a radiologist."""
    node.put([item])
    node.run()
    (row,) = node.worklist()
    confirm(node, row.answer, "normal")
    node.run()
    return node.record(row.answer)


def kept(node: Node) -> int:
    return int(
        sqlite3.connect(node.state / "cases" / "cases.sqlite").execute("SELECT COUNT(*) FROM cases").fetchone()[0]
    )


@pytest.mark.parametrize("header", ["", "YES"])
def test_text_in_the_original_keeps_a_case_out_of_learning_with_a_reason(tmp_path: Path, header: str) -> None:
    dropped = Dropped()
    node = Node(tmp_path, enqueue=dropped)
    record = answered(node, writing(header))
    assert record.assessed or record.reason
    assert kept(node) == 0
    assert not dropped.messages
    assert "burned into the image" in reading.withheld(tmp_path / "cases" / "cases.sqlite", record.case)


def test_the_page_of_a_study_says_why_nothing_is_learned_from_it(tmp_path: Path) -> None:
    served = ReadingNode(tmp_path).start()
    try:
        served.person("dr", "radiologist")
        with served.client() as page:
            assert page.post("/login", data={"name": "dr", "password": PASSWORD}).status_code == 303
            answer = next(row["answer"] for row in page.get("/api/worklist").json() if row["finding"])
            assert "Not used for learning" not in page.get(f"/studies/{answer}").text
            cases = CaseStore(tmp_path / "cases" / "cases.sqlite")
            cases.withhold(served.studies.answer(answer), "text is burned into the image", 0.0)
            cases.close()
            assert "Not used for learning: text is burned into the image." in page.get(f"/studies/{answer}").text
    finally:
        served.stop()


def test_an_original_that_is_gone_keeps_a_case_out_too(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.put([phantom_study("chest-xray", 1, seed=11)[0]])
    node.run()
    (row,) = node.worklist()
    for path in (tmp_path / "spool").glob("*.dcm"):
        path.unlink()
    confirm(node, row.answer, "normal")
    node.run()
    assert kept(node) == 0
    assert "no longer here" in reading.withheld(tmp_path / "cases" / "cases.sqlite", node.record(row.answer).case)


def test_a_case_that_was_kept_before_goes_when_its_original_turns_out_to_hold_text(tmp_path: Path) -> None:
    node = Node(tmp_path)
    record = answered(node, phantom_study("chest-xray", 1, seed=11)[0])
    cases = tmp_path / "cases" / "cases.sqlite"
    assert kept(node) == 1
    assert not reading.withheld(cases, record.case)
    (path,) = (tmp_path / "spool").glob("*.dcm")
    item = pydicom.dcmread(path)
    item.BurnedInAnnotation = "YES"
    item.save_as(path)
    confirm(node, record.answer, "pneumonia")
    node.run()
    assert kept(node) == 0
    assert reading.withheld(cases, record.case)


def test_the_child_that_builds_documents_looks_while_the_pipeline_goes_on(tmp_path: Path) -> None:
    builder = Builder()
    try:
        node = Node(tmp_path, builder=builder)
        record = answered(node, phantom_study("chest-xray", 1, seed=11)[0])
        for _ in range(600):  # the child's answer is polled, as in the real process
            node.run()
            if kept(node):
                break
            builder.look(tmp_path / "none", 0).result()  # one worker: after this, what was asked before is done
        assert kept(node) == 1
        assert not reading.withheld(tmp_path / "cases" / "cases.sqlite", record.case)
    finally:
        builder.close()
