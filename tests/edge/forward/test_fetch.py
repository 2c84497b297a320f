"""Fetching from a real Orthanc to our own door: priors, the rest of a series, and never in a loop."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileDataset

from edge.forward import fetch, reading
from edge.forward.fetch import Fetcher, Moved, as_texts, choose_priors, find, move
from edge.forward.follow import FetchRule
from edge.forward.peer import Peer
from edge.forward.queue import PRIOR_S
from edge.forward.rules import Rule
from edge.intake.door import Door
from edge.intake.peers import Peer as Caller
from scripts.lab.parts import Orthanc, start_orthanc
from shared.errors import LinkError, PeerError
from tests.simulators.forwarding import OURS, ForwardingNode, peer_of, receive
from tests.simulators.modality import phantom_study, storescu, write_files
from tests.simulators.node import make_door, make_pipeline, make_spool, run_until_idle

PRIORS = FetchRule("archive", "priors", modality=("CR", "DX"), body_part=("CHEST",), count=2, within_days=1095)
SERIES = FetchRule("archive", "series", modality=("CT",))
ALL = Rule(name="all", action="both", destinations=("archive",))


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    spool = make_spool(tmp_path / "n")
    found = make_door(spool, allow=(Caller("MODALITY"), Caller("PACS")))
    yield found
    found.stop()
    spool.close()


@pytest.fixture
def pacs(tmp_path: Path, door: Door) -> Iterator[Orthanc]:
    orthanc = start_orthanc(tmp_path / "pacs", peers=[(OURS, door.port)])
    yield orthanc
    orthanc.child.stop()


def study(seed: int, *, patient: str = "P1", date: str = "20260102", modality: str = "") -> FileDataset:
    item = phantom_study("chest-xray", 0, seed=seed, patient=patient, modality=modality)[0]
    item.StudyDate = date
    return item


def fill(pacs: Orthanc, folder: Path, objects: list[FileDataset]) -> None:
    done = storescu(pacs.dicom_port, write_files(folder, objects), called="PACS")
    assert done.returncode == 0, done.stderr


def held(state: Path, column: str = "study") -> set[str]:
    database = sqlite3.connect(state / "intake.sqlite")
    rows = database.execute(f"SELECT {column} FROM objects").fetchall()  # noqa: S608
    database.close()
    return {str(row[0]) for row in rows}


@pytest.mark.e2e
def test_priors_are_fetched_once_kept_and_lead_to_nothing_more(tmp_path: Path, door: Door, pacs: Orthanc) -> None:
    wanted = [study(1, date="20251001"), study(2, date="20240601")]
    others = [
        study(3, date="20230601"),  # the third newest
        study(4, date="20100101"),  # too old
        study(5, date="20260102"),  # of the same day
        study(6, date="20251101", patient="P2"),
        study(7, date="20251101", modality="MR"),
    ]
    fill(pacs, tmp_path / "old", [*wanted, *others])
    node = ForwardingNode(tmp_path / "n", [ALL], [peer_of(pacs, "archive")], fetches=[PRIORS])
    now = study(8)
    assert storescu(door.port, write_files(tmp_path / "now", [now])).returncode == 0
    node.follow()
    fetcher = node.fetcher(peer_of(pacs, "archive"))
    node.clock.advance(5)
    assert fetcher.step()
    assert held(node.state) == {one.StudyInstanceUID for one in [now, *wanted]}
    assert node.follow() == 2
    assert not fetcher.step()  # the priors ask for no priors
    (archive,) = reading.destinations(node.state / "forward.sqlite", {"archive": ""})
    assert archive.waiting == 1  # the new one: what came from the archive does not go back
    pipeline = make_pipeline(node.state, routes=node.routes, quiet_s=0)
    run_until_idle(pipeline)
    assert reading.not_read(node.state / "results.sqlite") == {"keep": 2}
    (done,) = reading.fetches(node.state / "forward.sqlite")
    assert (done.kind, done.state, done.count, done.moved) == ("priors", "done", 1, 2)
    receive(node.state, [study(9, date="20260102")])  # another study of the patient: the same priors are here
    node.follow()
    node.clock.advance(5)
    assert fetcher.step()
    assert sum(one.moved for one in reading.fetches(node.state / "forward.sqlite")) == 2


@pytest.mark.e2e
def test_a_series_that_lacks_images_gets_just_those(tmp_path: Path, door: Door, pacs: Orthanc) -> None:
    slices = phantom_study("chest-ct", 0, seed=4, slices=9)
    paths = write_files(tmp_path / "series", slices)
    assert storescu(pacs.dicom_port, paths, called="PACS").returncode == 0
    assert storescu(door.port, paths[:6]).returncode == 0
    node = ForwardingNode(tmp_path / "n", [], [peer_of(pacs, "archive")], fetches=[SERIES])
    node.follow()
    fetcher = node.fetcher(peer_of(pacs, "archive"))
    assert not fetcher.step()  # more may come by itself
    node.clock.advance(10)
    assert fetcher.step()
    assert held(node.state, "sop_instance") == {one.SOPInstanceUID for one in slices}
    assert node.follow() == 3
    node.clock.advance(10)
    assert not fetcher.step()
    (done,) = reading.fetches(node.state / "forward.sqlite")
    assert (done.kind, done.state, done.moved) == ("series", "done", 3)
    # what was missing is read like all the others
    assert node.routes.decide(node.routes.facts(slices[8], _Sent())).read


class _Sent:
    calling_ae, called_ae, sop_class, study = "PACS", OURS, "", "1.2.3"


@pytest.mark.e2e
def test_an_archive_that_does_not_know_us_is_told_with_the_cure_and_given_up(tmp_path: Path) -> None:
    orthanc = start_orthanc(tmp_path / "pacs", peers=[("SOMEBODY", 1)])
    try:
        peer = peer_of(orthanc, "archive")
        fill(orthanc, tmp_path / "old", [study(1, date="20251001")])
        node = ForwardingNode(tmp_path / "n", [], [peer], fetches=[PRIORS])
        receive(node.state, [study(8)])
        node.follow()
        fetcher = node.fetcher(peer)
        for _ in range(6):
            node.clock.advance(1000)
            fetcher.step()
        (done,) = reading.fetches(node.state / "forward.sqlite")
        assert done.state == "dead"
        assert done.last_error
        assert done.cure
        with pytest.raises(LinkError) as caught:
            list(move(peer, "STUDY", {"StudyInstanceUID": "1.2"}, to="NOBODY", ours="SOMEBODY"))
        assert "NOBODY" in f"{caught.value.message} {caught.value.cure}" or "refuses the move" in caught.value.message
    finally:
        orthanc.child.stop()


@pytest.mark.e2e
def test_find_shows_what_is_there_and_refuses_what_is_no_keyword(tmp_path: Path, pacs: Orthanc) -> None:
    old = study(1, date="20251001")
    fill(pacs, tmp_path / "old", [old])
    peer = peer_of(pacs, "archive")
    found = find(peer, "STUDY", {"PatientID": "P1", "StudyInstanceUID": "", "ModalitiesInStudy": ""}, ours=OURS)
    assert [as_texts(one)["StudyInstanceUID"] for one in found] == [old.StudyInstanceUID]
    assert find(peer, "STUDY", {"PatientID": "NOBODY"}, ours=OURS) == []
    with pytest.raises(PeerError, match="PatientTitle"):
        find(peer, "STUDY", {"PatientTitle": "1"}, ours=OURS)
    *_, sent = move(peer, "STUDY", {"StudyInstanceUID": old.StudyInstanceUID}, to=OURS, ours=OURS)
    assert (sent.completed, sent.failed) == (1, 0)
    assert held(tmp_path / "n") == {old.StudyInstanceUID}


def prior(uid: str, date: str, *, patient: str = "P1", modalities: str = "CR", issuer: str = "") -> dict[str, str]:
    return {
        "StudyInstanceUID": uid,
        "StudyDate": date,
        "PatientID": patient,
        "ModalitiesInStudy": modalities,
        "IssuerOfPatientID": issuer,
    }


@pytest.mark.parametrize(
    ("match", "chosen"),
    [
        (prior("1", "20250101"), True),
        (prior("1", "20250101", modalities="MR\\CR"), True),
        (prior("1", "20250101", patient="P1 "), True),
        (prior("1", "20250101", issuer="HOSPITAL"), True),
        (prior("1", "20250101", issuer="OTHER"), False),
        (prior("1", "20250101", patient="P10"), False),
        (prior("1", "20250101", patient=""), False),
        (prior("1", "20250101", modalities="MR"), False),
        (prior("1", "20260102"), False),  # the same day
        (prior("1", "20270101"), False),
        (prior("1", "20220101"), False),
        (prior("1", ""), False),
        (prior("9.9", "20250101"), False),  # the study itself
        (prior("", "20250101"), False),
    ],
)
def test_only_an_older_study_of_exactly_this_patient_and_modality_is_a_prior(
    match: dict[str, str], chosen: bool
) -> None:
    asked = {"issuer": "HOSPITAL", "study": "9.9", "before": "20260102", "modality": "CR", "count": 5}
    assert bool(choose_priors([match], patient="P1", within_days=1095, **asked)) == chosen
    assert choose_priors([match], patient="", within_days=1095, **asked) == []


def test_the_newest_priors_are_chosen() -> None:
    matches = [prior("1", "20240101"), prior("2", "20250101"), prior("3", "20230601")]
    asked = {"patient": "P1", "issuer": "", "study": "9", "before": "20260102", "modality": "CR", "within_days": 9999}
    assert choose_priors(matches, count=2, **asked) == ["2", "1"]


def test_a_study_counts_as_fetched_for_a_week(tmp_path: Path) -> None:
    node = ForwardingNode(tmp_path, [], [Peer("archive", "A", "127.0.0.1", 1)])
    node.queue.note_priors(["1.2"], "3.4", node.now())
    assert node.queue.is_prior("1.2", node.now())
    assert not node.queue.is_prior("1.2", node.now() + PRIOR_S + 1)
    assert not node.queue.is_prior("3.4", node.now())


class _Archive:
    """Answers each C-FIND with what it is given, and counts the questions."""

    def __init__(self, *answers: Dataset | Exception) -> None:
        self.answers = answers
        self.asked = 0

    def __call__(self, *_: object, **__: object) -> list[Dataset]:
        self.asked += 1
        for one in self.answers:
            if isinstance(one, Exception):
                raise one
        return [one for one in self.answers if isinstance(one, Dataset)]


def asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: _Archive, *seeds: int
) -> tuple[ForwardingNode, Fetcher, list[str]]:
    """A node that wants the priors of studies, one a seed; what it asks to be moved stands in the list."""
    peer = Peer("archive", "A", "127.0.0.1", 1)
    node = ForwardingNode(tmp_path, [], [peer], fetches=[PRIORS])
    receive(node.state, [study(seed) for seed in seeds])
    node.follow()
    moved: list[str] = []

    def moving(_peer: Peer, _level: str, keys: dict[str, str], **__: object) -> Iterator[Moved]:
        moved.append(keys["StudyInstanceUID"])
        yield Moved(0, 1, 0, 0)

    monkeypatch.setattr(fetch, "find", archive)
    monkeypatch.setattr(fetch, "move", moving)
    node.clock.advance(5)
    return node, node.fetcher(peer), moved


def answer(uid: str | None, number: str = "1") -> Dataset:
    found = Dataset()
    found.PatientID, found.StudyDate, found.ModalitiesInStudy = "P1", "20251001", "DX"
    if uid is not None:
        found.StudyInstanceUID = uid
    found.NumberOfStudyRelatedInstances = number
    return found


def test_an_answer_without_its_uid_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = _Archive(answer(None), answer("1.2\\1.3"), answer("*"), answer("1.4"))
    node, fetcher, moved = asking(tmp_path, monkeypatch, archive, 1)
    assert fetcher.step()
    assert moved == ["1.4"]
    (done,) = reading.fetches(node.state / "forward.sqlite")
    assert (done.state, done.moved) == ("done", 1)


def test_a_fetch_that_meets_something_odd_ends_with_its_reason_and_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = _Archive(LookupError("odd"))
    node, fetcher, _ = asking(tmp_path, monkeypatch, archive, 1, 2)
    for _ in range(30):
        fetcher.step()
        node.clock.advance(1000)
    assert archive.asked == 10  # five tries each
    (done,) = reading.fetches(node.state / "forward.sqlite")
    assert (done.state, done.count) == ("dead", 2)
    assert "LookupError" in done.last_error
    assert done.cure


def test_a_study_of_the_first_year_has_no_priors_before_the_calendar() -> None:
    asked = {"patient": "P1", "issuer": "", "study": "9", "before": "00010103", "modality": "CR", "within_days": 9999}
    assert choose_priors([prior("1", "00010101")], count=2, **asked) == ["1"]
