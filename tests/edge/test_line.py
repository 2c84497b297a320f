"""The line before the models: who goes first, what waits for whom, and that it stays short."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from edge.forward.routes import Routes
from edge.forward.rules import Rule
from edge.imaging.ahead import Ahead
from edge.imaging.reading import Parts, read_object
from edge.imaging.urgency import says_urgent
from edge.inference.engine import Outputs
from edge.line import LENGTH
from edge.results.store import Store
from models.phantom_dicom import to_bytes
from shared.errors import PeerError, StateError
from shared.package.manifest import Head
from tests.edge.test_pipeline import Node
from tests.simulators.modality import encoded, phantom_study
from tests.simulators.node import OneModel, baseline, run_until_idle


def radiographs(count: int, first: int = 0) -> list[pydicom.FileDataset]:
    return [phantom_study("chest-xray", n % 3, seed=first + n, patient=f"P{first + n}")[0] for n in range(count)]


class Seen(OneModel):
    """Counts the runs, and the images in each."""

    def __init__(self, batch: int = 1) -> None:
        super().__init__()
        engine, manifest, digest = self.served
        self.runs: list[int] = []
        outer = self

        class Engine:
            variant, provider, degraded, digest = engine.variant, engine.provider, "", engine.digest

            def __init__(self) -> None:
                self.batch = batch

            def run(self, images: np.ndarray) -> Outputs:
                outer.runs.append(len(images))
                return engine.run(images)

        self.served = (Engine(), manifest, digest)  # type: ignore[assignment]


def order(node: Node) -> list[str]:
    rows = sorted(node.worklist(), key=lambda row: node.record(row.answer).answered_at)
    return [row.study for row in rows]


class Ticking(Node):
    """Its clock goes on whenever it is asked, so that answers have an order."""

    def __init__(self, state: Path, **options: object) -> None:
        super().__init__(state, **options)
        plain = self.clock.now

        def now():  # type: ignore[no-untyped-def]
            self.clock.seconds += 1e-4
            return plain()

        self.clock.now = now  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["RequestedProcedurePriority", "StudyPriorityID"])
def test_an_emergency_goes_before_all_that_is_not_in_the_line_yet(tmp_path: Path, name: str) -> None:
    node = Ticking(tmp_path)
    items = radiographs(LENGTH * 3)
    setattr(items[-1], name, "STAT" if name.startswith("Req") else "HIGH")
    node.put(items)
    node.run()
    place = order(node).index(str(items[-1].StudyInstanceUID))
    assert place <= LENGTH
    assert [one for one in order(node) if one != items[-1].StudyInstanceUID] == [
        str(one.StudyInstanceUID) for one in items[:-1]
    ]


def test_a_rule_of_high_priority_makes_an_emergency(tmp_path: Path) -> None:
    rule = Rule("er", "analyse", priority="high", study_description=("*trauma*",))
    node = Ticking(tmp_path, routes=Routes([rule], {}, lambda _study: False))
    items = radiographs(LENGTH * 3)
    items[-2].StudyDescription = "TRAUMA ROOM 1"
    node.put(items)
    node.run()
    assert order(node).index(str(items[-2].StudyInstanceUID)) <= LENGTH


def test_every_answer_comes_once_also_when_the_process_ends_with_a_full_line(tmp_path: Path) -> None:
    node = Node(tmp_path)
    items = radiographs(LENGTH * 2 + 3)
    items[-1].RequestedProcedurePriority = "STAT"
    node.put(items)
    node.pipeline.step()
    node.pipeline.step()
    node.start()  # a new process: what was leased lapses
    node.run()
    assert sorted(order(node)) == sorted(str(one.StudyInstanceUID) for one in items)
    assert node.count("answers") == len(items)
    assert node.count("work WHERE tries > 2") == 0


def test_what_is_ready_does_not_wait_for_what_is_not_and_the_line_is_bounded(tmp_path: Path) -> None:
    gate, begun = threading.Event(), []

    def slow(path: Path, heads: Sequence[Head]) -> Parts:
        begun.append(path)
        if len(begun) == 1:
            assert gate.wait(30)
        return read_object(path, heads)

    node = Ticking(tmp_path)
    node.pipeline.close()
    node.pipeline._ahead.__init__([slow, slow])  # type: ignore[misc]
    items = radiographs(LENGTH + 4)
    node.put(items)
    while len(order(node)) < LENGTH - 1:
        assert node.pipeline.step()
    assert str(items[0].StudyInstanceUID) not in order(node)
    assert node.count("work") <= 2 * LENGTH  # leased a few at a time
    gate.set()
    node.run()
    assert len(order(node)) == len(items)


def test_other_bytes_of_an_instance_do_not_go_before_the_first(tmp_path: Path) -> None:
    node = Node(tmp_path)
    first, other, third = radiographs(1)[0], radiographs(1)[0], radiographs(1, first=1)[0]
    other.PatientComments = "sent again"
    node.put([first, other, third])
    line, held = node.pipeline._line, []

    def begin(_path: Path, _heads: Sequence[Head], *, urgent: bool) -> Future[Parts]:
        assert not urgent
        held.append(Future())
        if len(held) > 1:
            held[-1].set_result(None)  # type: ignore[arg-type]
        return held[-1]

    line._ahead.begin = begin  # type: ignore[method-assign]
    assert [one.claimed.sop_instance for one in line.take(1.0)] == [third.SOPInstanceUID]
    held[0].set_result(None)
    (one,), (two,) = line.take(1.0), line.take(1.0)
    assert one.claimed.sop_instance == two.claimed.sop_instance
    assert one.claimed.stored_at < two.claimed.stored_at


def test_an_urgent_copy_with_other_bytes_does_not_go_before_the_first(tmp_path: Path) -> None:
    node = Ticking(tmp_path)
    items = radiographs(LENGTH * 2)
    again = radiographs(LENGTH * 2)[-1]
    again.RequestedProcedurePriority = "STAT"
    again.StudyInstanceUID += ".1"  # a study is as urgent as its first image
    node.put([*items, again])
    seen, begin = [], node.pipeline._line._ahead.begin

    def noted(path: Path, heads: Sequence[Head], *, urgent: bool) -> Future[Parts]:
        seen.append((path.name, urgent))
        return begin(path, heads, urgent=urgent)

    node.pipeline._line._ahead.begin = noted  # type: ignore[method-assign]
    node.run()
    stored = [row["file"] for row in node.spool.index.rows("SELECT file FROM objects ORDER BY id")]
    assert [name for name, _ in seen] == stored
    assert not any(urgent for _, urgent in seen)


def test_waiting_for_the_first_of_an_instance_does_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(tmp_path)
    first, other = radiographs(1)[0], radiographs(1)[0]
    other.PatientComments = "sent again"
    node.put([first, other])
    line, waited = node.pipeline._line, []
    held: list[Future[Parts]] = [Future(), Future()]
    held[1].set_result(None)  # type: ignore[arg-type]
    futures = iter(held)
    line._ahead.begin = lambda *_, **__: next(futures)  # type: ignore[method-assign]

    def wait(futures: Sequence[Future[Parts]], **_: object) -> None:
        waited.append(list(futures))
        held[0].set_result(None)  # type: ignore[arg-type]

    monkeypatch.setattr("edge.line.wait", wait)
    assert len(line.take(1.0)) == 1
    assert waited == [[held[0]]]


def test_a_lone_image_is_one_run_and_a_burst_is_taken_together_where_batches_pay(tmp_path: Path) -> None:
    models = Seen(batch=4)
    node = Node(tmp_path, models=models)
    node.put(radiographs(1))
    node.run()
    assert models.runs == [1]
    study = phantom_study("chest-ct", 1, seed=3, slices=LENGTH)
    node.put(study)
    plain = Node(tmp_path / "plain")
    plain.put(study)
    for one in (node, plain):
        one.run(after_s=1)
    assert sum(models.runs) == 1 + LENGTH
    assert max(models.runs) <= 4
    ours, theirs = (
        np.frombuffer(one.record(next(row.answer for row in one.worklist() if row.modality == "CT")).logits, "<f4")
        for one in (node, plain)
    )
    assert np.allclose(ours, theirs, atol=1e-3)


def test_a_complete_series_does_not_wait_for_a_burst_of_others(tmp_path: Path) -> None:
    node = Ticking(tmp_path)
    node.put(phantom_study("chest-ct", 1, seed=3, slices=3), association="a")
    node.run()
    node.spool.association_ended("a")
    node.put(radiographs(LENGTH * 2))
    node.clock.seconds += 1
    node.run()
    records = sorted((node.record(row.answer) for row in node.worklist()), key=lambda one: one.answered_at)
    assert records[0].modality == "CT"


def test_an_object_that_may_have_ended_the_process_is_read_alone(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.put(radiographs(4))
    Store(node.results, node.state / "intake.sqlite").claim(1.0)  # leased all four, and died
    models = Seen()
    node.options = {"models": models}
    node.start()
    node.pipeline.step()
    node.pipeline.step()
    assert node.count("work WHERE tries = 2") <= 2
    node.run()
    assert len(node.worklist()) == 4


def test_a_swap_while_objects_are_in_the_line_reads_them_for_the_new_package(tmp_path: Path) -> None:
    models = OneModel()
    node = Node(tmp_path, models=models)
    gate = threading.Event()

    def slow(path: Path, heads: Sequence[Head]) -> Parts:
        assert gate.wait(30)
        return read_object(path, heads)

    node.pipeline.close()
    node.pipeline._ahead.__init__([slow])  # type: ignore[misc]
    node.put(radiographs(3))
    node.pipeline._line._fill(1.0)
    engine, manifest, _ = baseline()
    models.served = (engine, manifest, "b" * 64)
    gate.set()
    run_until_idle(node.pipeline)
    assert {row.package for row in node.worklist()} == {"b" * 64}


def test_ahead_gives_the_readers_own_error_and_reads_what_is_urgent_first() -> None:
    gate, read = threading.Event(), []

    def reads(path: Path, heads: Sequence[Head]) -> Parts:
        assert gate.wait(30)
        read.append(path.name)
        raise PeerError(f"no {path.name}")

    ahead = Ahead([reads])
    futures = [ahead.begin(Path(name), [], urgent=name == "u") for name in ("a", "b", "u")]
    gate.set()
    for future, name in zip(futures, ("a", "b", "u"), strict=True):
        with pytest.raises(PeerError, match=f"no {name}"):
            future.result(30)
    ahead.close()
    assert read in (["a", "u", "b"], ["u", "a", "b"])  # a reader may have taken "a" up already


@pytest.mark.parametrize(("value", "urgent"), [("STAT", True), ("high", True), ("ROUTINE", False), ("", False)])
@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, None])
def test_urgency_is_what_the_image_says_in_every_encoding(
    tmp_path: Path, value: str, urgent: bool, syntax: str | None
) -> None:
    item = phantom_study("chest-xray", 1, seed=1)[0]
    long = pydicom.dcmread(io.BytesIO(to_bytes(item)))
    for one, more in ((item, b""), (long, bytes(100_000))):  # with a private value before it, longer than a glance
        one.RequestedProcedurePriority = value
        if more:
            one.private_block(0x0029, "BENCH", create=True).add_new(1, "OB", more)
        if syntax == ExplicitVRBigEndian:
            one.PixelData = one.pixel_array.astype(">u2").tobytes()
        if syntax:
            one.file_meta.TransferSyntaxUID = UID(syntax)
        path = tmp_path / f"{len(more)}.dcm"
        pydicom.dcmwrite(path, one, enforce_file_format=True)
        with path.open("rb") as file:
            file.seek(132)
            pydicom.filereader._read_file_meta_info(file)
            offset = file.tell()
        assert says_urgent(path, offset, str(one.file_meta.TransferSyntaxUID)) is urgent


def test_an_image_that_says_nothing_of_it_is_not_urgent(tmp_path: Path) -> None:
    item = phantom_study("chest-xray", 1, seed=1)[0]
    path = tmp_path / "one.dcm"
    path.write_bytes(encoded(item))
    assert not says_urgent(path, 0, str(item.file_meta.TransferSyntaxUID))
    with pytest.raises(StateError):
        says_urgent(tmp_path / "gone.dcm", 0, str(item.file_meta.TransferSyntaxUID))
