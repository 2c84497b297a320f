"""Who may call and how: wildcards, admitted and unknown callers, limits of a peer, TLS with client certificates."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom.uid import UID
from pynetdicom.dimse_primitives import C_STORE

from edge.intake.association import Waits
from edge.intake.door import Door
from edge.intake.index import CALLERS_KEPT, Index
from edge.intake.part import Arriving, RefusedError
from edge.intake.peers import AllowList, Peer, admitted_callers, plain_address
from edge.intake.services import NAGLE, SLOW, Room, _note
from edge.intake.spool import Spool
from edge.intake.status import Outcome
from edge.intake.tls import Tls
from edge.web.labels import Labels
from scripts.lab.child import wait_until
from shared.clock import SystemClock
from shared.errors import ConfigError
from tests.simulators.modality import EXPLICIT, associate, encoded, phantom_study, send_raw, storescu, write_files
from tests.simulators.node import make_door, make_spool
from tests.simulators.pki import TestAuthority
from tests.simulators.release import HandClock

ITEM = phantom_study("chest-xray", 0, seed=1)[0]
CLASS, INSTANCE, DATA = str(ITEM.SOPClassUID), str(ITEM.SOPInstanceUID), encoded(ITEM)


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = make_spool(tmp_path / "node")
    yield made
    made.close()


@pytest.fixture
def door(spool: Spool) -> Iterator[Door]:
    made = make_door(spool)
    yield made
    made.stop()


def echo(port: int, *options: str, calling: str = "MODALITY") -> subprocess.CompletedProcess[str]:
    command = ["echoscu", "-v", *options, "-aet", calling, "-aec", "RADFLEET", "127.0.0.1", str(port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("title", "address", "let_in"),
    [
        ("CT1", "10.1.2.3", True),
        ("CT12", "10.1.2.3", False),
        ("MR7", "::ffff:10.9.9.9", True),
        ("MR7", "10.10.0.1", False),
        ("ct1", "10.1.2.3", False),
        ("X*", "127.0.0.1", False),
        ("STAR*", "127.0.0.1", True),
        ("STARS", "127.0.0.1", False),
    ],
)
def test_the_allow_list_takes_wildcards_and_networks(title: str, address: str, let_in: bool) -> None:
    allow = AllowList(
        (Peer("CT?"), Peer("MR*", "10.9.0.0/16")), lambda: [Peer("STAR[*]", "127.0.0.1"), Peer("BAD", "127.0.0.1")]
    )
    assert (allow.find(title, address) is not None) == let_in


def test_a_wrong_network_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="CT1"):
        AllowList((Peer("CT1", "10.1.2.300"),))


def test_an_unknown_caller_waits_on_the_page_and_is_let_in_when_admitted(tmp_path: Path, spool: Spool) -> None:
    labels = tmp_path / "labels.sqlite"
    door = make_door(spool)
    door._room.allow = AllowList((), admitted_callers(labels))
    try:
        assert echo(door.port, calling="NEW*CT").returncode != 0
        assert echo(door.port, calling="NEW*CT").returncode != 0
        (caller,) = spool.index.rows("SELECT * FROM callers")
        assert (caller["ae_title"], caller["address"], caller["times"]) == ("NEW*CT", "127.0.0.1", 2)
        assert "Verification SOP Class" in caller["proposed"]
        Labels(labels, SystemClock()).close()
        with sqlite3.connect(labels) as database:
            database.execute("CREATE TABLE IF NOT EXISTS admitted (ae_title TEXT, address TEXT, by TEXT, at TEXT)")
            database.execute(
                "INSERT INTO admitted (ae_title, address, by, at) VALUES ('NEW*CT', '127.0.0.1', 'a', '2026')"
            )
        assert echo(door.port, calling="NEW*CT").returncode == 0
        assert echo(door.port, calling="NEWEST CT").returncode != 0  # its star is no wildcard
    finally:
        door.stop()


def test_a_caller_with_a_wrong_called_title_shows_what_it_called(door: Door, spool: Spool) -> None:
    command = ["echoscu", "-aet", "MODALITY", "-aec", "RADFLET", "127.0.0.1", str(door.port)]
    assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0
    (caller,) = spool.index.rows("SELECT * FROM callers")
    assert (caller["ae_title"], caller["called_ae"]) == ("MODALITY", "RADFLET")


def test_attack_a_flood_of_titles_does_not_grow_the_inbox(tmp_path: Path) -> None:
    index = Index(tmp_path / "intake.sqlite")
    for number in range(CALLERS_KEPT + 50):
        index.caller(f"AE{number}", "10.0.0.1", "RADFLEET", "", float(number))
    rows = index.rows("SELECT ae_title FROM callers ORDER BY last_at")
    assert len(rows) == CALLERS_KEPT
    assert rows[0]["ae_title"] == "AE50"
    index.close()


def test_a_peer_has_no_more_associations_than_its_own(tmp_path: Path, spool: Spool) -> None:
    door = make_door(spool, allow=(Peer("GREEDY", associations=2), Peer("OTHER")))
    try:
        held = [associate(door.port, [(CLASS, EXPLICIT)], calling="GREEDY") for _ in range(2)]
        answer = echo(door.port, calling="GREEDY")
        assert "Local Limit Exceeded" in answer.stderr
        assert "Rejected Transient" in answer.stderr
        assert echo(door.port, calling="OTHER").returncode == 0
        held[0].release()
        wait_until("the slot to be free", lambda: echo(door.port, calling="GREEDY").returncode == 0)
        held[1].release()
    finally:
        door.stop()


def test_an_object_above_the_peers_own_limit_is_out_of_resources(spool: Spool) -> None:
    door = make_door(spool, allow=(Peer("MODALITY", object_limit_bytes=1000),))
    try:
        association = associate(door.port, [(CLASS, EXPLICIT)])
        assert send_raw(association, CLASS, INSTANCE, EXPLICIT, DATA) == 0xA700
        association.release()
        assert list(spool.folder.iterdir()) == []
    finally:
        door.stop()


def test_a_full_spool_rejects_new_associations_as_transient(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    door = make_door(spool)
    try:
        monkeypatch.setattr(spool, "fullness", lambda: 0.98)
        answer = echo(door.port)
        assert "Temporary Congestion" in answer.stderr
        monkeypatch.setattr(spool, "fullness", lambda: 0.5)
        assert echo(door.port).returncode == 0
    finally:
        door.stop()


@pytest.mark.parametrize(
    ("waits", "note"),
    [
        (Waits(messages=20, stalled=11), NAGLE),
        (Waits(messages=20, stalled=10), ""),
        (Waits(messages=7, stalled=7), ""),
        (Waits(messages=1, reading_s=30.0, bytes=1_000_000), SLOW),
        (Waits(messages=1, reading_s=30.0, bytes=100_000_000), ""),
    ],
)
def test_a_slow_peer_is_named_with_the_cure(waits: Waits, note: str) -> None:
    assert _note(waits) == note


def test_what_the_door_refused_lies_in_the_quarantine_with_its_reason(door: Door, spool: Spool) -> None:
    association = associate(door.port, [(CLASS, EXPLICIT)])
    assert send_raw(association, CLASS, INSTANCE, EXPLICIT, DATA[:5000]) == 0xC000
    assert send_raw(association, CLASS, "1.2.3", EXPLICIT, DATA) == 0xA900
    assert send_raw(association, CLASS, "../../x", EXPLICIT, DATA) == 0x0117
    association.release()
    rows = spool.index.rows("SELECT * FROM quarantine ORDER BY at")
    assert [row["outcome"] for row in rows] == ["cut", "bad_uid"]  # one digest, two refusals: the later is told
    assert all(row["reason"] and row["calling_ae"] == "MODALITY" for row in rows)
    kept = [(spool.quarantine_folder / row["file"]).read_bytes() for row in rows]
    assert kept[0].endswith(DATA[:5000])
    assert kept[1].endswith(DATA)
    assert list(spool.folder.iterdir()) == []
    assert sorted(path.name for path in spool.quarantine_folder.parent.rglob("x")) == []


def test_the_quarantine_has_a_quota_and_the_oldest_goes(tmp_path: Path) -> None:
    spool = make_spool(tmp_path, quarantine_limit_bytes=5000)
    for length in (2000, 2100, 2200):
        with pytest.raises(RefusedError):
            spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [DATA[:length]])
    assert [row["length"] for row in spool.index.rows("SELECT * FROM quarantine ORDER BY at")] == [2100, 2200]
    assert len(list(spool.quarantine_folder.iterdir())) == 2
    spool.close()


def altered(**changes: str) -> bytes:
    item = phantom_study("chest-xray", 0, seed=1)[0]
    for name, value in changes.items():
        setattr(item, name, value)
    return encoded(item)


def test_one_uid_for_two_patients_is_an_identity_conflict(spool: Spool) -> None:
    assert spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [DATA]) is Outcome.STORED
    other = altered(PatientID="SOMEBODY ELSE")
    assert spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [other]) is Outcome.IDENTITY_CONFLICT
    states = [(row["state"], row["conflict"]) for row in spool.index.rows("SELECT * FROM objects ORDER BY id")]
    assert states == [("kept", 1), ("identity_conflict", 1)]
    files = {path.read_bytes()[-len(other) :] for path in spool.folder.iterdir()}
    assert other in files
    assert len(files) == 2


def test_one_uid_for_other_pixels_is_an_identity_conflict_another_comment_is_none(spool: Spool) -> None:
    spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [DATA])
    item = phantom_study("chest-xray", 0, seed=1)[0]
    item.PixelData = item.PixelData[:-2] + b"\7\7"
    assert spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [encoded(item)]) is Outcome.IDENTITY_CONFLICT
    assert spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [altered(PatientComments="x")]) is Outcome.CONFLICT


def test_an_identity_conflict_is_found_again_by_a_rebuilt_index(tmp_path: Path, spool: Spool) -> None:
    spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [DATA])
    spool.store(Arriving(CLASS, INSTANCE, EXPLICIT), [altered(PatientID="SOMEBODY ELSE")])
    for path in (tmp_path / "node").glob("intake.sqlite*"):
        path.unlink()
    again = make_spool(tmp_path / "node")
    assert sorted(row["state"] for row in again.index.rows("SELECT state FROM objects")) == [
        "identity_conflict",
        "kept",
    ]
    again.close()


def test_objects_that_finish_together_share_a_commit_and_each_is_there(spool: Spool) -> None:
    items = [phantom_study("chest-xray", 0, seed=seed)[0] for seed in range(8)]
    barrier, outcomes = threading.Barrier(8), []

    def store(number: int) -> None:
        item = items[number]
        part = spool.begin(Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), EXPLICIT))
        part.write(encoded(item))
        barrier.wait(10)
        outcomes.append(spool.finish(part))

    threads = [threading.Thread(target=store, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes == [Outcome.STORED] * 8
    assert {row["sop_instance"] for row in spool.index.rows("SELECT * FROM objects")} == {
        str(item.SOPInstanceUID) for item in items
    }


class Pki:
    def __init__(self, folder: Path) -> None:
        self.authority = TestAuthority(folder / "ca")
        self.door = self.authority.issue("localhost", file="door")
        self.modality = self.authority.issue("CT1", file="modality")
        self.stranger = TestAuthority(folder / "other").issue("CT1", file="stranger")

    def options(self, leaf: object) -> list[str]:
        return ["+tls", str(leaf.key_file), str(leaf.certificate), "+cf", str(self.authority.ca)]  # type: ignore[attr-defined]


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path / "pki")


@pytest.fixture
def tls_door(spool: Spool, pki: Pki) -> Iterator[Door]:
    made = make_door(spool, tls=Tls(pki.door.certificate, pki.door.key_file, pki.authority.ca))
    yield made
    made.stop()


def test_a_modality_with_a_certificate_stores_over_tls(tls_door: Door, spool: Spool, pki: Pki, tmp_path: Path) -> None:
    sent = storescu(tls_door.tls_port, write_files(tmp_path / "send", [ITEM]), *pki.options(pki.modality))
    assert sent.returncode == 0, sent.stderr
    assert len(spool.index.digests(INSTANCE)) == 1


def test_attack_a_strangers_certificate_or_none_is_refused_and_others_go_on(tls_door: Door, pki: Pki) -> None:
    assert echo(tls_door.tls_port, *pki.options(pki.stranger)).returncode != 0
    assert echo(tls_door.tls_port).returncode != 0
    assert echo(tls_door.port, *pki.options(pki.modality)).returncode != 0  # TLS to the plain port
    assert echo(tls_door.tls_port, *pki.options(pki.modality)).returncode == 0
    assert tls_door.counts()["tls_refused"] >= 2


def test_attack_an_old_tls_version_is_refused(tls_door: Door) -> None:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{tls_door.tls_port}", "-tls1_1"]
    done = subprocess.run(command, capture_output=True, text=True, input="", timeout=30, check=False)
    assert "Cipher is (NONE)" in done.stdout or done.returncode != 0


def test_attack_a_silent_handshake_does_not_hold_the_door(tls_door: Door, pki: Pki) -> None:
    silent = [socket.create_connection(("127.0.0.1", tls_door.tls_port)) for _ in range(20)]
    for one in silent:
        one.send(b"\x16\x03")  # the beginning of a ClientHello
    try:
        assert echo(tls_door.tls_port, *pki.options(pki.modality)).returncode == 0
    finally:
        for one in silent:
            one.close()


def test_a_new_certificate_is_served_without_a_restart_and_a_broken_one_is_not(tls_door: Door, pki: Pki) -> None:
    other = TestAuthority(pki.authority.ca.parent / "new")
    leaf = other.issue("localhost", file="new")
    before = served(tls_door)
    leaf.certificate.replace(pki.door.certificate)
    assert served(tls_door) == before  # certificate and key do not belong together: the last good pair serves
    leaf.key_file.replace(pki.door.key_file)
    assert served(tls_door) != before


def served(door: Door) -> str:
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{door.tls_port}", "-showcerts"]
    done = subprocess.run(command, capture_output=True, text=True, input="", timeout=30, check=False)
    return done.stdout.partition("-----BEGIN CERTIFICATE-----")[2].partition("-----END")[0]


def test_a_certificate_that_never_worked_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(ConfigError, match="certificate"):
        Tls(tmp_path / "x.pem", tmp_path / "x.pem", tmp_path / "x.pem").context()


@pytest.mark.parametrize("command_class", ["1.2.3.4.5", "1.2.840.10008.1.1", "", "../../x"])
def test_attack_a_command_for_another_class_than_its_context_is_refused(
    door: Door, spool: Spool, command_class: str
) -> None:
    association = associate(door.port, [(CLASS, EXPLICIT)])
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request._affected_sop_class_uid, request.AffectedSOPInstanceUID = UID(command_class), INSTANCE
    request.DataSet = BytesIO(DATA)
    association._reactor_checkpoint.clear()
    association.dimse.send_msg(request, association.accepted_contexts[0].context_id)
    _, response = association.dimse.get_msg(block=True)
    association.abort()
    assert response is None or response.Status == 0xA900
    assert list(spool.folder.iterdir()) == []


def test_many_titles_of_one_address_share_its_slots(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.intake.services.PEER_ASSOCIATIONS", 2)
    door = make_door(spool, allow=(Peer("CT*"),))
    try:
        held = [associate(door.port, [(CLASS, EXPLICIT)], calling=f"CT{number}") for number in range(3)]
        assert [one.is_established for one in held] == [True, True, False]
        for one in held[:2]:
            one.release()
    finally:
        door.stop()


def test_the_rate_of_a_peer_holds_over_all_its_associations() -> None:
    clock = HandClock()
    room = Room(
        spool=None,  # type: ignore[arg-type]
        ae_title="RADFLEET",
        allow=AllowList(()),
        storage=frozenset(),
        syntaxes=(),
        nudge=lambda: None,
        clock=clock,
        limit=10,
    )
    slow = Peer("CT*", objects_per_second=2.0)
    assert [room.pace(slow) for _ in range(3)] == [0.0, 0.5, 1.0]
    clock.advance(10)
    assert room.pace(slow) == 0.0
    assert room.pace(Peer("MR")) == 0.0


def test_an_ipv4_caller_on_an_ipv6_socket_is_shown_and_admitted_as_what_it_is() -> None:
    assert plain_address("::ffff:10.0.0.7") == "10.0.0.7"
    assert plain_address("fe80::1%eth0") == "fe80::1"
    assert AllowList((Peer("CT1", "10.0.0.7"),)).find("CT1", "::ffff:10.0.0.7") is not None


@pytest.mark.parametrize("title", ["CT\\1", "CT\ufffd", "", " CT", "A" * 17])
def test_attack_what_is_no_ae_title_matches_no_wildcard(title: str) -> None:
    assert AllowList((Peer("*"),)).find(title, "10.0.0.7") is None


def test_attack_no_thread_left_costs_a_connection_and_not_the_door(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if not failures:
            failures.append(thread)
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert echo(door.port).returncode != 0
    assert failures
    assert echo(door.port).returncode == 0
    assert door.alive()
