"""The node's journal, its downloads and its swaps, with ONNX Runtime and real packages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge.inference.engine import OnnxEngine
from edge.slots.fetch import RETRY_AFTER, needed
from edge.slots.journal import ATTEMPTS, IN_FLIGHT, Journal
from edge.slots.swap import install_baseline
from shared.errors import PeerError, RoomError, StateError
from shared.package.manifest import Manifest, decode_manifest
from shared.wire.records import ReleaseOrder
from tests.simulators.package import MODEL, SIDE, build_package, change_one_weight
from tests.simulators.release import CloudSide, HandClock, NodeSide, load_one_thread

A, B, C = "a" * 64, "b" * 64, "c" * 64
LINE = ["OFFERED", "VERIFIED", "DOWNLOADED", "STAGED", "SHADOW", "READY", "PROVISIONAL"]


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def journal(tmp_path: Path, clock: HandClock) -> Journal:
    journal = Journal(tmp_path / "slots.sqlite", clock)
    journal.install(A, 1)
    return journal


def bring(journal: Journal, package: str, release: int, state: str) -> None:
    assert journal.offer(package, release)
    for step in LINE[1 : LINE.index(state) + 1]:
        if step == "VERIFIED":
            journal.verified(package, 10)
        else:
            journal.advance(package, step)  # type: ignore[arg-type]


class TestJournal:
    def test_the_whole_line(self, journal: Journal) -> None:
        bring(journal, B, 2, "PROVISIONAL")
        assert journal.committed() == (A, 1)
        journal.commit(B, "well")
        assert journal.committed() == (B, 2)
        assert journal.previous() == A
        assert [state for state, _ in journal.history(B)] == [*LINE, "COMMITTED"]

    def test_no_step_may_be_left_out(self, journal: Journal) -> None:
        for index, state in enumerate(LINE[:-1]):
            package = f"{index:064x}"
            bring(journal, package, 2, state)
            for other in LINE:
                if LINE.index(other) != index + 1:
                    with pytest.raises(StateError, match="cannot become"):
                        journal.advance(package, other)  # type: ignore[arg-type]
            with pytest.raises(StateError, match="not PROVISIONAL"):
                journal.commit(package)
            assert journal.waiting(state) is not None  # type: ignore[arg-type]

    def test_a_newer_offer_supersedes_what_is_in_flight(self, journal: Journal) -> None:
        bring(journal, B, 2, "SHADOW")
        assert journal.offer(C, 3)
        slot = journal.get(B)
        assert slot is not None
        assert (slot.state, slot.reason) == ("REFUSED", "superseded by release 3")

    def test_nothing_is_offered_while_one_is_provisional(self, journal: Journal) -> None:
        bring(journal, B, 2, "PROVISIONAL")
        assert not journal.offer(C, 3)
        assert journal.get(C) is None

    def test_what_serves_or_flies_is_not_offered_again(self, journal: Journal) -> None:
        assert not journal.offer(A, 1)
        for state in IN_FLIGHT[:1]:
            bring(journal, B, 2, state)
            assert not journal.offer(B, 2)

    def test_three_attempts_then_no_more_until_it_is_withdrawn(self, journal: Journal) -> None:
        for _ in range(ATTEMPTS):
            assert journal.offer(B, 2)
            journal.refuse(B, "expired", final=False)
        assert not journal.offer(B, 2)
        journal.withdraw()
        assert journal.offer(B, 2)

    def test_what_failed_for_good_stays_refused(self, journal: Journal) -> None:
        bring(journal, B, 2, "SHADOW")
        journal.refuse(B, "wrong outputs", final=True)
        journal.withdraw()
        assert not journal.offer(B, 2)

    def test_a_provisional_one_is_neither_refused_nor_withdrawn(self, journal: Journal) -> None:
        bring(journal, B, 2, "PROVISIONAL")
        journal.refuse(B, "late", final=False)
        assert not journal.withdraw()
        slot = journal.get(B)
        assert slot is not None
        assert slot.state == "PROVISIONAL"

    @pytest.mark.parametrize("state", ["STAGED", "SHADOW", "READY", "PROVISIONAL"])
    def test_recovery(self, journal: Journal, state: str) -> None:
        bring(journal, B, 2, state)
        journal.recover()
        slot = journal.get(B)
        assert slot is not None
        assert (slot.state, slot.attempts) == ("DOWNLOADED", 2)
        assert journal.committed() == (A, 1)

    @pytest.mark.parametrize(("state", "end"), [("SHADOW", "REFUSED"), ("PROVISIONAL", "ROLLED_BACK")])
    def test_what_takes_the_process_down_is_given_up(self, journal: Journal, state: str, end: str) -> None:
        bring(journal, B, 2, state)
        for _ in range(ATTEMPTS):
            journal.recover()
            for step in LINE[3 : LINE.index(state) + 1]:
                if journal.waiting("ROLLED_BACK") is None and journal.waiting("REFUSED") is None:
                    journal.advance(B, step)  # type: ignore[arg-type]
        slot = journal.get(B)
        assert slot is not None
        assert (slot.state, slot.final) == (end, True)
        assert journal.committed() == (A, 1)

    def test_back_to_one_that_was_committed_before(self, journal: Journal) -> None:
        bring(journal, B, 2, "PROVISIONAL")
        journal.commit(B)
        bring(journal, A, 1, "PROVISIONAL")
        assert journal.committed() == (B, 2)
        journal.recover()  # killed while going back
        assert journal.committed() == (B, 2)
        for step in LINE[3:]:
            journal.advance(A, step)  # type: ignore[arg-type]
        journal.commit(A)
        assert journal.committed() == (A, 1)
        assert journal.previous() == B

    def test_abandoning_falls_back_once_and_then_says_so(self, journal: Journal) -> None:
        bring(journal, B, 2, "PROVISIONAL")
        journal.commit(B)
        journal.abandon(B, "damaged")
        assert journal.committed() == (A, 1)
        journal.abandon(A, "damaged")
        assert journal.committed() is None

    def test_another_process_sees_every_step(self, journal: Journal, tmp_path: Path, clock: HandClock) -> None:
        other = Journal(tmp_path / "slots.sqlite", clock)
        bring(journal, B, 2, "DOWNLOADED")
        other.advance(B, "STAGED")
        assert not journal.offer(B, 2)
        assert next((r.package, r.state) for r in journal.reports()) == (B, "STAGED")
        with pytest.raises(StateError):
            journal.advance(B, "DOWNLOADED")

    def test_trusted_metadata_is_replaced_as_one(self, journal: Journal) -> None:
        journal.keep_trusted("release", {"timestamp.json": b"1", "root_history/1.root.json": b"r"})
        journal.keep_trusted("release", {"timestamp.json": b"2"})
        assert journal.trusted("release") == {"timestamp.json": b"2"}
        assert journal.trusted("director") == {}


@pytest.fixture
def cloud(tmp_path: Path, clock: HandClock) -> CloudSide:
    return CloudSide(tmp_path, clock)


@pytest.fixture
def node(tmp_path: Path, cloud: CloudSide, clock: HandClock) -> NodeSide:
    return NodeSide(tmp_path / "node", cloud, clock)


@pytest.fixture
def order(cloud: CloudSide) -> ReleaseOrder:
    order = cloud.release(2)
    cloud.name(2)
    return order


class TestFetch:
    def test_only_what_this_machine_can_run_is_downloaded(self, node: NodeSide, cloud: CloudSide) -> None:
        cloud.build(2, variants=("cpu-fp32", "cuda-fp16"))
        order = cloud.release(2)
        cloud.name(2)
        node.install(order)
        assert node.serving == order.package
        names = {p.name for p in (node.state / "models" / order.package).iterdir()}
        assert names == {"manifest.json", "golden.safetensors", "card.md", MODEL}

    def test_a_machine_that_runs_no_variant(self, cloud: CloudSide) -> None:
        manifest = decode_manifest((cloud.packages / "1" / "manifest.json").read_bytes())
        with pytest.raises(PeerError, match="runs on Tensor"):
            needed(manifest, ["TensorrtExecutionProvider"])

    def test_nothing_new_costs_no_request(self, node: NodeSide, order: ReleaseOrder) -> None:
        node.install(order)
        node.fetched.clear()
        node.fetch(order)
        assert node.fetched == []

    def test_a_refused_order_is_tried_again_later_and_not_for_ever(
        self, node: NodeSide, cloud: CloudSide, clock: HandClock
    ) -> None:
        order = cloud.release(2)
        attempts = 0
        for _ in range(20):
            node.fetched.clear()
            node.fetch(order)  # the director names nothing
            attempts += bool(node.fetched)
            clock.advance(RETRY_AFTER.total_seconds() / 2)
        assert attempts == ATTEMPTS
        cloud.name(2)
        node.fetch(None)
        node.install(order)
        assert node.serving == order.package

    def test_a_full_disk_keeps_the_order_and_the_model(
        self, node: NodeSide, cloud: CloudSide, order: ReleaseOrder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise RoomError("no room")

        monkeypatch.setattr(node.fetcher, "_download", full)
        with pytest.raises(RoomError):
            node.fetch(order)
        assert node.state_of(order.package) == "VERIFIED"
        assert node.serving == cloud.baseline
        monkeypatch.undo()
        node.fetcher._download = node.download
        node.install(order)
        assert node.serving == order.package

    def test_a_staged_file_changed_on_disk_is_fetched_anew(
        self, node: NodeSide, cloud: CloudSide, order: ReleaseOrder, clock: HandClock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The downloader trusts what lies under the final name; the verification after it does not."""

        def lazy(url_path: str, path: Path, sha256: str, length: int) -> None:
            if not path.exists():
                node.download(url_path, path, sha256, length)

        monkeypatch.setattr(node.fetcher, "_download", lazy)
        node.fetcher.step(order)
        node.fetcher.step(order)
        staged = node.state / "models" / ".staging" / order.package / MODEL
        staged.parent.mkdir(parents=True)
        staged.write_bytes(b"planted")
        node.fetch(order)
        assert node.state_of(order.package) == "REFUSED"
        assert node.serving == cloud.baseline
        clock.advance(RETRY_AFTER.total_seconds())
        node.install(order)
        assert node.serving == order.package

    def test_remains_of_another_download_are_swept(self, node: NodeSide, order: ReleaseOrder) -> None:
        stale = node.state / "models" / ".staging" / B
        stale.mkdir(parents=True)
        (stale / "half").write_bytes(b"x")
        node.fetch(order)
        assert not stale.exists()

    def test_the_pipeline_is_nudged_once(self, node: NodeSide, order: ReleaseOrder) -> None:
        node.fetch(order)
        node.fetch(order)
        assert node.nudges == 1


class TestSwap:
    def test_every_study_is_answered_while_models_change(self, node: NodeSide, order: ReleaseOrder) -> None:
        node.fetch(order)
        answered = [node.read_study()]
        for _ in range(8):
            node.swapper.step()
            answered.append(node.read_study())
        assert answered[0] != order.package
        assert answered[-1] == order.package
        assert answered == sorted(answered, key=lambda d: d == order.package)  # one change, no way back

    def test_a_quiet_hospital_gets_the_model_too(self, node: NodeSide, order: ReleaseOrder, clock: HandClock) -> None:
        node.fetch(order)
        for _ in range(4):
            clock.advance(11)
            node.swapper.step()
        assert node.journal.committed() == (order.package, 2)
        assert ("READY", "0 of 0 shadow studies agree") in node.journal.history(order.package)

    def test_agreement_in_shadow_is_on_record(self, node: NodeSide, cloud: CloudSide, clock: HandClock) -> None:
        cloud.digests[2] = build_package(cloud.packages / "2", 2, seed=0)  # the baseline's weights: always agrees
        order = cloud.release(2)
        cloud.name(2)
        node.install(order)
        assert ("READY", "2 of 2 shadow studies agree") in node.journal.history(order.package)

    def test_a_candidate_that_fails_on_a_local_study_never_serves(
        self, node: NodeSide, cloud: CloudSide, order: ReleaseOrder
    ) -> None:
        node.fetch(order)
        node.swapper.step()
        watch = node.swapper._watch
        assert watch is not None

        class Broken:
            def run(self, images: np.ndarray) -> object:
                raise StateError("out of memory")

        object.__setattr__(watch.loaded, "engine", Broken())
        assert node.read_study() == cloud.baseline
        node.swapper.step()
        assert node.state_of(order.package) == "REFUSED"
        assert "out of memory" in node.reason_of(order.package)
        assert node.serving == cloud.baseline

    def test_outputs_that_are_no_numbers_undo_the_swap(
        self, node: NodeSide, cloud: CloudSide, order: ReleaseOrder
    ) -> None:
        node.fetch(order)
        for _ in range(4):
            node.swapper.step()
            if node.serving == order.package:
                break
            node.read_study()
        nothing = np.full((1, 2), np.nan, np.float32)
        node.swapper.observe(np.zeros((1, SIDE, SIDE), np.uint8), "xray", nothing)
        assert node.state_of(order.package) == "ROLLED_BACK"
        assert node.serving == cloud.baseline == node.read_study()
        assert node.records[-1].package == cloud.baseline
        node.install(order)  # the order still stands: it failed for good here
        assert node.serving == cloud.baseline

    def test_a_failure_of_the_committed_model_is_no_swap(self, node: NodeSide, cloud: CloudSide) -> None:
        assert not node.swapper.failed("the runtime is ill")
        assert node.serving == cloud.baseline

    def test_an_order_taken_back_in_shadow(self, node: NodeSide, cloud: CloudSide, order: ReleaseOrder) -> None:
        node.fetch(order)
        node.swapper.step()
        assert node.state_of(order.package) == "SHADOW"
        node.fetch(None)
        assert node.swapper.step()
        assert not node.swapper.step()  # dropped at once, and its memory with it
        for _ in range(6):
            node.swapper.step()
            node.read_study()
        assert node.state_of(order.package) == "REFUSED"
        assert node.serving == cloud.baseline

    def test_an_engine_that_was_built_meanwhile_serves_once_it_is_proven(self, node: NodeSide) -> None:
        package, manifest, digest = node.state / "models" / node.serving, node.swapper.serving()[1], node.serving
        change_what, built = [False], []

        def better(folder: Path, of: Manifest) -> OnnxEngine | None:
            assert (folder, of) == (package, manifest)
            if not built:
                return None
            engine = built.pop()
            if change_what[0]:
                engine.digest = "0" * 64
            return engine

        node.swapper._better = better
        assert not node.swapper.step()
        before = node.swapper.serving()[0]
        built.append(load_one_thread(package, manifest))
        change_what[0] = True
        assert node.swapper.step()
        assert node.swapper.serving()[0] is before  # it held other bytes
        change_what[0] = False
        built.append(load_one_thread(package, manifest))
        built[0].degraded = "told"
        assert node.swapper.step()
        engine, _, serving = node.swapper.serving()
        assert engine is not before
        assert (serving, node.records[-1].degraded) == (digest, "told")

    def test_the_proof_is_that_of_the_serving_process(self, node: NodeSide, order: ReleaseOrder) -> None:
        node.install(order)
        first = node.records[-1]
        node.restart()
        assert node.records[-1] == first
        assert len(first.golden) == 64


class TestBaseline:
    def test_is_installed_once_and_repaired(self, node: NodeSide, cloud: CloudSide) -> None:
        folder = node.state / "models" / cloud.baseline
        change_one_weight(folder / MODEL)
        assert install_baseline(node.state / "models", node.journal, cloud.packages / "1") == cloud.baseline
        assert (folder / MODEL).read_bytes() == (cloud.packages / "1" / MODEL).read_bytes()
        assert node.journal.committed() == (cloud.baseline, 1)

    def test_does_not_replace_what_is_committed(self, node: NodeSide, cloud: CloudSide, order: ReleaseOrder) -> None:
        node.install(order)
        install_baseline(node.state / "models", node.journal, cloud.packages / "1")
        assert node.journal.committed() == (order.package, 2)

    def test_serves_again_when_nothing_else_can(self, node: NodeSide, cloud: CloudSide) -> None:
        change_one_weight(node.state / "models" / cloud.baseline / MODEL)
        with pytest.raises(StateError, match="no model"):
            node.restart()
        install_baseline(node.state / "models", node.journal, cloud.packages / "1")
        node.restart()
        assert node.read_study() == cloud.baseline
