"""The main path: DICOM in, answer, report and picture in the PACS, case and features after a confirmation."""

from __future__ import annotations

import io
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pydicom
import pytest

from edge.imaging.pseudonym import case_pseudonym, is_held_out
from edge.inference.engine import load_engine
from edge.intake.part import Arriving
from edge.intake.spool import Spool
from edge.pipeline import Pipeline
from edge.results import reading
from edge.results.documents import Builder
from edge.results.reading import WorklistRow
from edge.results.store import MAX_TRIES, Store
from edge.results.tables import AnswerRecord
from edge.web.labels import Labels, Person
from scripts.lab.child import wait_until
from scripts.lab.parts import Orthanc, start_orthanc
from shared.clock import SystemClock
from shared.errors import StateError
from shared.package.input_spec import PixelMeaning, to_model_input
from shared.wire.records import FeatureBatch
from tests.simulators.modality import encoded, phantom_study, storescu, write_files
from tests.simulators.node import (
    BASELINE,
    SITE_KEY,
    OneModel,
    baseline,
    make_door,
    make_pipeline,
    make_spool,
    run_until_idle,
)


class Clock:
    """Wall clock by hand, so that quiet time passes when the test says so."""

    def __init__(self) -> None:
        self.seconds = 1_800_000_000.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.seconds, UTC)

    def monotonic(self) -> float:
        return self.seconds


class Node:
    """A spool and a pipeline on one state folder and one clock."""

    def __init__(self, state: Path, **options: object) -> None:
        self.state = state
        self.clock = Clock()
        self.spool: Spool = make_spool(state, self.clock)
        self.options = options
        self.pipeline = self.start()

    def start(self) -> Pipeline:
        """A new process on the same state."""
        self.pipeline = make_pipeline(self.state, clock=self.clock, **self.options)  # type: ignore[arg-type]
        return self.pipeline

    def put(self, items: Sequence[pydicom.Dataset], association: str = "") -> None:
        for item in items:
            self.clock.seconds += 0.01
            arriving = Arriving(
                str(item.SOPClassUID),
                str(item.SOPInstanceUID),
                str(item.file_meta.TransferSyntaxUID),
                "MODALITY",
                "127.0.0.1",
                association,
            )
            self.spool.store(arriving, [encoded(item)])

    def run(self, *, after_s: float = 0.0) -> None:
        self.clock.seconds += after_s
        run_until_idle(self.pipeline)

    @property
    def results(self) -> Path:
        return self.state / "results.sqlite"

    def worklist(self) -> list[WorklistRow]:
        return reading.worklist(self.results, self.state / "labels.sqlite")

    def record(self, answer: str, version: int | None = None) -> AnswerRecord:
        record = reading.answer_detail(self.results, answer, version)
        assert record is not None
        return record

    def count(self, question: str) -> int:
        database = sqlite3.connect(self.results)
        found = int(database.execute(f"SELECT COUNT(*) FROM {question}").fetchone()[0])  # noqa: S608 words of this file
        database.close()
        return found


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_a_radiograph_is_answered_on_arrival(node: Node) -> None:
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.run()
    (row,) = node.worklist()
    assert (row.title, row.modality, row.images, row.version) == ("Chest X-ray", "DX", 1, 1)
    record = node.record(row.answer)
    assert record.assessed
    assert record.phantom
    evidence = np.frombuffer(record.evidence, "<f4").reshape(record.evidence_shape)
    assert np.abs(evidence.mean(axis=(1, 2)) - np.frombuffer(record.logits, "<f4")).max() < 1e-4
    assert len(record.features) == 2 * baseline()[1].feature_size
    assert {"wait", "read", "decode", "preprocess", "infer", "decide"} <= record.timings.keys()
    assert record.weights == baseline()[0].digest
    assert node.count("deliveries") == 2


def test_most_phantoms_are_answered_right(node: Node) -> None:
    """The whole path keeps what the model knows: a swapped axis or a lost inversion would show here."""
    truth = {}
    for label in range(3):
        for seed in range(4):
            items = phantom_study("chest-xray", label, seed=100 + seed, patient=f"P{label}{seed}")
            truth[str(items[0].StudyInstanceUID)] = baseline()[1].head("chest-xray").classes[label].name
            node.put(items)
    node.run()
    right = sum(row.finding_name == truth[row.study] for row in node.worklist())
    assert right >= 9


def test_a_series_is_pooled_when_it_is_quiet_and_late_slices_give_a_new_version(node: Node) -> None:
    study = phantom_study("chest-ct", 2, seed=5, slices=12)
    node.put(study[:10])
    node.run()
    assert node.worklist() == []
    node.run(after_s=1)
    (row,) = node.worklist()
    assert (row.images, row.version) == (10, 1)
    first = node.record(row.answer)
    assert first.complete == "quiet time"
    node.put(study[10:])
    node.run(after_s=1)
    (row,) = node.worklist()
    assert (row.images, row.version) == (12, 2)
    assert reading.versions(node.results, row.answer) == [1, 2]
    reports = {uid for (uid,) in sqlite3.connect(node.results).execute("SELECT sop_instance FROM deliveries")}
    assert len(reports) == 4


def test_a_series_answer_is_the_same_whatever_order_its_slices_came_in(tmp_path: Path) -> None:
    study = phantom_study("chest-ct", 2, seed=5, slices=8)
    records = []
    for number, order in enumerate((study, study[::-1])):
        node = Node(tmp_path / str(number))
        node.put(order)
        node.run(after_s=1)
        records.append(node.record(node.worklist()[0].answer))
    for name in ("logits", "features", "probabilities", "shown", "image", "evidence"):
        assert getattr(records[0], name) == getattr(records[1], name), name


def test_the_image_of_a_series_is_the_slice_with_the_largest_evidence(node: Node) -> None:
    study = phantom_study("brain-mri", 1, seed=7, slices=8)
    node.put(study)
    node.run(after_s=1)
    record = node.record(node.worklist()[0].answer)
    engine, manifest, _ = baseline()
    head = manifest.head("brain-mri")
    image = np.frombuffer(record.image, np.uint8).reshape(record.image_shape)
    shown = engine.run(image[None]).logits[0, head.offset + record.chosen]
    database = sqlite3.connect(node.results)
    peaks = dict(database.execute("SELECT class, logit FROM peaks WHERE answer = ?", (record.answer,)).fetchall())
    assert shown == pytest.approx(peaks[record.chosen], abs=1e-5)
    assert record.shown.sop_instance in {str(item.SOPInstanceUID) for item in study}


def test_the_end_of_an_association_completes_a_series_at_once(node: Node) -> None:
    node.put(phantom_study("chest-ct", 0, seed=5, slices=4), association="a1")
    node.run()
    assert node.worklist() == []
    node.spool.association_ended("a1")
    node.run()
    assert node.record(node.worklist()[0].answer).complete == "association ended"


def test_a_sender_that_opens_an_association_an_image_waits_for_quiet(node: Node) -> None:
    for number, item in enumerate(phantom_study("chest-ct", 0, seed=5, slices=4)):
        node.put([item], association=f"a{number}")
        node.spool.association_ended(f"a{number}")
        node.run()
    assert node.worklist() == []
    node.run(after_s=1)
    assert [row.version for row in node.worklist()] == [1]


def test_what_no_head_reads_is_said_once_a_series(node: Node) -> None:
    study = phantom_study("chest-ct", 0, seed=5, slices=3)
    for item in study:
        item.BodyPartExamined = "ABDOMEN"
    node.put(study)
    node.run(after_s=1)
    (row,) = node.worklist()
    assert row.reason == "no model reads CT of ABDOMEN"
    assert (row.finding, row.images) == ("", 3)
    database = sqlite3.connect(node.results)
    ((kind, data),) = database.execute("SELECT kind, data FROM deliveries").fetchall()
    assert kind == "report"
    assert "Not assessed: no model reads CT of ABDOMEN." in pydicom.dcmread(io.BytesIO(data)).to_json()
    assert reading.counts(node.results).not_assessed == 1


def test_images_unlike_the_training_images_are_not_assessed(node: Node) -> None:
    study = phantom_study("chest-ct", 0, seed=1, slices=3)
    for item in study:
        y, x = np.mgrid[: item.Rows, : item.Columns]
        item.PixelData = ((x // 5 + y // 5) % 2 * 2000).astype(np.uint16).tobytes()
    node.put(study)
    node.run(after_s=1)
    (row,) = node.worklist()
    assert "unlike the training images" in row.reason
    assert row.finding == ""


def test_a_blank_radiograph_is_not_assessed(node: Node) -> None:
    item = phantom_study("chest-xray", 0, seed=1)[0]
    item.PixelData = bytes(len(item.PixelData))
    node.put([item])
    node.run()
    assert node.worklist()[0].reason == "the image is blank"


def test_an_unreadable_object_is_quarantined_with_its_reason_and_its_bytes_stay(node: Node) -> None:
    bad, good = phantom_study("chest-xray", 0, seed=1)[0], phantom_study("chest-xray", 0, seed=2)[0]
    bad.PixelData = bad.PixelData[:1000]
    node.put([bad, good])
    node.run()
    (kept,) = reading.quarantine(node.results)
    assert "1000 bytes" in kept.reason
    assert kept.sop_instance == bad.SOPInstanceUID
    assert (node.state / "spool" / f"{kept.digest}.dcm").exists()
    assert len(node.worklist()) == 1
    assert reading.counts(node.results).quarantined == 1


def test_our_own_results_that_come_back_are_ignored(node: Node) -> None:
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.run()
    made = [data for (data,) in sqlite3.connect(node.results).execute("SELECT data FROM deliveries")]
    node.put([pydicom.dcmread(io.BytesIO(data)) for data in made])
    node.run(after_s=1)
    assert len(node.worklist()) == 1
    assert node.count("answers") == 1
    assert node.count("work WHERE outcome = 'ignored'") == 2


def test_other_bytes_under_the_same_uid_give_a_flagged_new_version(node: Node) -> None:
    node.put(phantom_study("chest-xray", 1, seed=11))
    other = phantom_study("chest-xray", 1, seed=11)[0]
    other.PatientComments = "sent again"
    node.put([other])
    node.run()
    (row,) = node.worklist()
    assert row.version == 2
    assert row.conflict


def test_the_swapper_is_shown_every_study_once(tmp_path: Path) -> None:
    models = OneModel()
    node = Node(tmp_path, models=models)
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.put(phantom_study("chest-ct", 1, seed=11, slices=5))
    node.run(after_s=1)
    assert models.observed == [("chest-xray", 1), ("chest-ct", 1)]


def test_a_series_that_a_swap_cuts_in_two_is_read_again_by_the_new_package(tmp_path: Path) -> None:
    models = OneModel()
    node = Node(tmp_path, models=models)
    study = phantom_study("chest-ct", 2, seed=5, slices=6)
    node.put(study[:3])
    node.run()
    engine, manifest, _ = baseline()
    models.served = (engine, manifest, "b" * 64)
    node.put(study[3:5])
    node.run(after_s=1)
    (row,) = node.worklist()
    assert (row.package, row.images, row.version) == ("b" * 64, 5, 1)
    models.served = (engine, manifest, "c" * 64)  # and after the answer: one late slice
    node.put(study[5:])
    node.run(after_s=1)
    (row,) = node.worklist()
    assert (row.package, row.images, row.version) == ("c" * 64, 6, 2)


def test_a_lost_intake_index_repeats_nothing_and_loses_nothing(node: Node) -> None:
    for seed in (11, 12, 13):
        node.put(phantom_study("chest-xray", 1, seed=seed))
    node.run()
    node.spool.close()
    for path in [*node.state.glob("intake.sqlite*"), *list((node.state / "spool").iterdir())[:2]]:
        path.unlink()
    node.spool = make_spool(node.state, node.clock)
    node.start()
    for seed in (14, 15, 16):  # as many as get the ids that the old index had given
        node.put(phantom_study("chest-xray", 1, seed=seed))
    node.run()
    assert [row.version for row in node.worklist()] == [1] * 6


def test_the_same_slice_with_other_bytes_gives_no_new_answer(node: Node) -> None:
    study = phantom_study("chest-ct", 1, seed=11, slices=4)
    node.put(study)
    node.run(after_s=1)
    study[0].PatientComments = "other bytes"
    node.put(study[:1])
    node.run(after_s=1)
    (row,) = node.worklist()
    assert (row.version, row.images) == (1, 4)


def test_a_swap_and_its_undoing_inside_a_series_leave_no_slice_of_the_other_model(tmp_path: Path) -> None:
    study = phantom_study("chest-ct", 2, seed=5, slices=6)
    engine, manifest, digest = baseline()
    other = load_engine(BASELINE, manifest, threads=2, variant="cpu-fp32")
    models = OneModel()
    node, plain = Node(tmp_path / "a", models=models), Node(tmp_path / "b")
    for start, served in (
        (0, (engine, manifest, digest)),
        (2, (other, manifest, "b" * 64)),
        (4, (engine, manifest, digest)),
    ):
        models.served = served
        node.put(study[start : start + 2])
        node.run()
    node.run(after_s=1)
    plain.put(study)
    plain.run(after_s=1)
    (one,), (two,) = node.worklist(), plain.worklist()
    assert node.record(one.answer).logits == plain.record(two.answer).logits


def test_a_swap_between_the_last_slice_and_the_answer_reads_the_series_again(tmp_path: Path) -> None:
    study = phantom_study("chest-ct", 2, seed=5, slices=4)
    models = OneModel()
    node = Node(tmp_path, models=models)
    node.put(study)
    node.run()
    manifest = baseline()[1]
    models.served = (load_engine(BASELINE, manifest, threads=2, variant="cpu-fp32"), manifest, "b" * 64)
    node.run(after_s=1)
    record = node.record(node.worklist()[0].answer)
    slices = node.pipeline._store.slices(record.answer)
    assert (record.variant, len(record.inputs)) == ("cpu-fp32", 4)
    head = manifest.head("chest-ct")
    inputs = [
        to_model_input(i.pixel_array, PixelMeaning(intercept=float(i.RescaleIntercept)), head.input) for i in study
    ]
    logits = models.served[0].run(np.stack(inputs)).logits[:, head.offset : head.offset + 3]
    assert np.allclose(np.frombuffer(record.logits, "<f4"), logits.mean(axis=0), atol=1e-4)
    assert len(slices) == 4


def test_an_object_that_takes_the_process_down_is_quarantined_after_some_tries(node: Node) -> None:
    node.put(phantom_study("chest-xray", 1, seed=11))
    for _ in range(MAX_TRIES):
        store = Store(node.results, node.state / "intake.sqlite")
        claimed = store.claim(node.clock.seconds)
        assert claimed is not None
        store.close()  # died while reading it
    node.start()
    node.run()
    (kept,) = reading.quarantine(node.results)
    assert f"ended the process {MAX_TRIES} times" in kept.reason


@pytest.fixture
def builder() -> Iterator[Builder]:
    made = Builder()
    yield made
    made.close()


def test_documents_built_in_a_child_are_the_same(tmp_path: Path, builder: Builder) -> None:
    item = phantom_study("chest-xray", 1, seed=11)
    nodes = [Node(tmp_path / "a", builder=builder), Node(tmp_path / "b")]
    built = []
    for node in nodes:
        node.put(item)
        wait_until("the documents", lambda n=node: bool(n.run() or n.count("deliveries")), seconds=60)  # type: ignore[misc]
        built.append(sqlite3.connect(node.results).execute("SELECT data FROM deliveries ORDER BY kind").fetchall())
    assert built[0] == built[1]


def test_whoever_waits_is_woken_when_documents_are_finished(tmp_path: Path) -> None:
    woken = threading.Event()
    builder = Builder(woken.set)
    node = Node(tmp_path, builder=builder)
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.run()
    assert woken.wait(60)
    node.run()
    assert node.count("deliveries") == 2
    builder.close()


def test_attack_a_document_that_kills_its_builder_stops_nothing(tmp_path: Path, builder: Builder) -> None:
    node = Node(tmp_path, builder=builder)
    node.put(phantom_study("chest-xray", 1, seed=11))
    run_until_idle(node.pipeline)
    (child,) = builder._pool._processes
    os.kill(child, signal.SIGKILL)
    wait_until("the reason", lambda: bool(node.run() or node.count("answers WHERE documents LIKE 'not built%'")))
    node.put(phantom_study("chest-xray", 1, seed=12))
    wait_until("the next documents", lambda: bool(node.run() or node.count("deliveries")), seconds=60)
    assert len(node.worklist()) == 2


# -- confirmation ------------------------------------------------------------------------------------------------


class Dropped:
    """Where features go: by name, as the outbox keeps them."""

    def __init__(self) -> None:
        self.messages: dict[str, FeatureBatch] = {}
        self.calls = 0

    def __call__(self, stage: str, record: FeatureBatch, *, name: str) -> None:
        assert stage == "features"
        self.calls += 1
        self.messages[name] = record


def confirm(node: Node, answer: str, label: str) -> None:
    labels = Labels(node.state / "labels.sqlite", SystemClock())
    labels.add(answer, "", label, Person("dr", "radiologist"))
    labels.close()


def test_a_confirmed_answer_becomes_a_case_and_a_message_without_identifier(tmp_path: Path) -> None:
    dropped = Dropped()
    node = Node(tmp_path, enqueue=dropped)
    item = phantom_study("chest-xray", 1, seed=11, patient="CANARY-7")[0]
    node.put([item])
    node.run()
    (row,) = node.worklist()
    confirm(node, row.answer, "pneumonia")
    node.run()
    database = sqlite3.connect(tmp_path / "cases" / "cases.sqlite")
    database.row_factory = sqlite3.Row
    (case,) = database.execute("SELECT * FROM cases").fetchall()
    name = case_pseudonym(SITE_KEY, "CANARY-7", str(item.SOPInstanceUID))
    record = node.record(row.answer)
    assert (case["case"], case["head"], case["label"], case["phantom"]) == (name, "chest-xray", 1, 1)
    assert case["held_out"] == is_held_out(SITE_KEY, "CANARY-7", str(item.StudyInstanceUID))
    assert case["image"] == record.image
    ((_, batch),) = dropped.messages.items()
    assert (batch.package, batch.variant) == (record.package, record.variant)
    assert batch.rows[0].case == name
    assert batch.rows[0].features == record.features
    for secret in ("CANARY", "DOE", str(item.SOPInstanceUID), str(item.StudyInstanceUID)):
        assert secret not in repr(batch) + repr([tuple(case)])


def test_a_correction_replaces_the_label_and_sends_again(tmp_path: Path) -> None:
    dropped = Dropped()
    node = Node(tmp_path, enqueue=dropped)
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.run()
    (row,) = node.worklist()
    for label in ("pneumonia", "normal"):
        confirm(node, row.answer, label)
        node.run()
    assert sorted(batch.rows[0].label for batch in dropped.messages.values()) == [0, 1]
    database = sqlite3.connect(tmp_path / "cases" / "cases.sqlite")
    assert database.execute("SELECT label FROM cases").fetchall() == [(0,)]
    assert node.worklist()[0].label == "normal"


def test_a_crash_between_case_and_cursor_repeats_the_same_message(tmp_path: Path) -> None:
    dropped = Dropped()
    node = Node(tmp_path, enqueue=dropped)
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.run()
    confirm(node, node.worklist()[0].answer, "pneumonia")
    node.run()
    with sqlite3.connect(node.results) as database:
        database.execute("DELETE FROM cursors WHERE name = 'labels'")
    node.start()
    node.run()
    assert dropped.calls == 2
    assert len(dropped.messages) == 1


def test_a_label_that_the_head_does_not_know_stops_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, enqueue=Dropped())
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.run()
    answer = node.worklist()[0].answer
    confirm(node, answer, "fracture")
    confirm(node, "no such answer", "normal")
    confirm(node, answer, "normal")
    node.run()
    assert sqlite3.connect(tmp_path / "cases" / "cases.sqlite").execute("SELECT label FROM cases").fetchall() == [(0,)]


def test_features_off_keeps_the_case_and_sends_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, enqueue=None)
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.run()
    confirm(node, node.worklist()[0].answer, "normal")
    node.run()
    assert sqlite3.connect(tmp_path / "cases" / "cases.sqlite").execute("SELECT COUNT(*) FROM cases").fetchall() == [
        (1,)
    ]


# -- death --------------------------------------------------------------------------------------------------------


class Dead(BaseException):
    """The process ends here."""


@pytest.mark.parametrize(
    "where",
    ["claim", "add_answer", "finish", "add_slice", "close_series", "add_documents", "set_cursor", "note_study"],
)
def test_death_at_any_step_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    dropped = Dropped()
    node = Node(tmp_path, enqueue=dropped)
    node.put(phantom_study("chest-xray", 1, seed=11))
    node.put(phantom_study("chest-ct", 1, seed=11, slices=3))
    real = getattr(Store, where)
    for before in (True, False):

        def die(self: Store, *arguments: object, _before: bool = before, **named: object) -> object:
            if not _before:
                real(self, *arguments, **named)
            raise Dead

        monkeypatch.setattr(Store, where, die)
        with pytest.raises(Dead):
            node.run(after_s=1)
        monkeypatch.setattr(Store, where, real)
        node.start()
    node.run(after_s=1)
    assert sorted((row.title, row.version, row.images) for row in node.worklist()) == [
        ("Chest CT", 1, 3),
        ("Chest X-ray", 1, 1),
    ]
    assert node.count("answers") == 2
    assert node.count("deliveries") == 4
    assert node.count("quarantine") == 0


def test_a_failing_runtime_ends_the_process_and_the_object_is_read_afterwards(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.put(phantom_study("chest-xray", 1, seed=11))
    engine = type(baseline()[0])
    real = engine.run

    def fail(*_: object) -> None:
        raise StateError("out of memory")

    monkeypatch.setattr(engine, "run", fail)
    with pytest.raises(StateError):
        node.run()
    monkeypatch.setattr(engine, "run", real)
    node.start()
    node.run()
    assert len(node.worklist()) == 1


@pytest.fixture
def pacs(tmp_path: Path) -> Iterator[Orthanc]:
    orthanc = start_orthanc(tmp_path / "pacs")
    yield orthanc
    orthanc.child.stop()


@pytest.mark.e2e
def test_sigkill_of_the_pipeline_again_and_again_doubles_nothing_in_the_pacs(tmp_path: Path, pacs: Orthanc) -> None:
    """storescu to our door to the PACS, while the answering process is killed at whatever it is doing."""
    state = tmp_path / "state"
    spool = make_spool(state)
    door = make_door(spool)
    studies = [phantom_study("chest-xray", n % 3, seed=n, patient=f"P{n}") for n in range(12)]
    studies.append(phantom_study("chest-ct", 1, seed=3, slices=8))
    expected = len(studies)
    command = [sys.executable, "-m", "tests.simulators.node", "pipeline", str(state), str(pacs.dicom_port)]
    log = (tmp_path / "pipeline.log").open("ab")
    try:
        for number in range(4):
            part = studies[number::4]
            files = write_files(tmp_path / f"send{number}", [item for study in part for item in study])
            assert storescu(door.port, files).returncode == 0
            child = subprocess.Popen(command, stdout=log, stderr=log)
            target = expected * 2 * (number + 1) // 5
            wait_until("some results in the PACS", lambda t=target: pacs.count() >= t, seconds=90)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        child = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_until("all results in the PACS", lambda: pacs.count() >= expected * 2, seconds=90)
            results = state / "results.sqlite"
            wait_until("nothing to wait", lambda: reading.counts(results).waiting_for_pacs == 0, seconds=30)
        finally:
            child.kill()
            child.wait()
        rows = reading.worklist(results, state / "labels.sqlite")
        assert len(rows) == expected
        made = sum(row.version for row in rows) * 2  # a CT cut by a kill may have been answered in two versions
        assert pacs.count() == made
        assert reading.counts(results).quarantined == 0
    finally:
        door.stop()
        log.close()
