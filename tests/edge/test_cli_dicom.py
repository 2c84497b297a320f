"""echo, send, find, move and whatif as an operator types them, against Orthanc, DCMTK's storescp and our own door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from click.testing import Result
from typer.testing import CliRunner

from edge.cli import app
from scripts.lab.child import Child, free_port, listens
from scripts.lab.parts import Orthanc, start_orthanc
from shared.errors import ConfigError, LinkError, PeerError
from tests.edge.forward.test_sending import archive
from tests.simulators.forwarding import OURS, radiographs
from tests.simulators.modality import phantom_study, write_files
from tests.simulators.node import make_door, make_spool
from tests.simulators.pki import TestAuthority
from tests.simulators.real_data import DATA, needs_data

pytestmark = pytest.mark.e2e


def radfleet(*words: object, fails: type[Exception] | None = None) -> Result:
    """Runs `radfleet-edge` with these words; `fails` is the family of the error it must end with."""
    done = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "250"})
    if fails is None:
        assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    else:
        assert isinstance(done.exception, fails), f"{done.output} {done.exception!r}"
    return done


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Orthanc, Path]]:
    """An Orthanc that may move to our door, and the state folder of that door."""
    state = tmp_path_factory.mktemp("node")
    spool = make_spool(state)
    from edge.intake.peers import Peer as Caller

    door = make_door(spool, allow=(Caller("PACS"),))
    orthanc = start_orthanc(tmp_path_factory.mktemp("pacs"), peers=[(OURS, door.port)])
    yield orthanc, state
    orthanc.child.stop()
    door.stop()
    spool.close()


def test_echo_tells_who_answers(pacs: tuple[Orthanc, Path]) -> None:
    port = pacs[0].dicom_port
    assert "PACS at 127.0.0.1" in radfleet("echo", "127.0.0.1", port, "--aec", "PACS").output


def test_send_find_and_move(tmp_path: Path, pacs: tuple[Orthanc, Path]) -> None:
    orthanc, state = pacs
    at = ("127.0.0.1", orthanc.dicom_port)
    slices = phantom_study("chest-ct", 0, seed=3, slices=5, patient="CLI1")
    write_files(tmp_path / "a" / "b", slices)
    (tmp_path / "a" / "readme.txt").write_text("not DICOM")
    said = radfleet("send", *at, tmp_path / "a", "--aec", "PACS").output
    assert "5 sent, 0 not taken, 1 skipped." in said
    assert "skipped" in said
    found = radfleet("find", *at, "--aec", "PACS", "-k", "PatientID=CLI1", "--json").output
    (study,) = map(json.loads, found.splitlines())
    assert study["StudyInstanceUID"] == slices[0].StudyInstanceUID
    table = radfleet("find", *at, "-k", "PatientID=CLI1").output
    assert slices[0].StudyInstanceUID in table
    assert "1 found." in table
    series = radfleet("find", *at, "--level", "series", "-k", f"StudyInstanceUID={study['StudyInstanceUID']}").output
    assert slices[0].SeriesInstanceUID in series
    moved = radfleet("move", *at, "-k", f"StudyInstanceUID={study['StudyInstanceUID']}").output
    assert "5 moved, 0 failed." in moved
    assert len(list((state / "spool").glob("*.dcm"))) == 5


def test_a_command_that_achieved_nothing_fails(tmp_path: Path, pacs: tuple[Orthanc, Path]) -> None:
    at = ("127.0.0.1", pacs[0].dicom_port)
    (tmp_path / "readme.txt").write_text("not DICOM")
    assert "no DICOM file" in str(radfleet("send", *at, tmp_path, fails=PeerError).exception)
    radfleet("move", *at, fails=PeerError)
    radfleet("find", *at, "-k", "Nonsense=1", fails=PeerError)
    radfleet("find", *at, "--level", "planet", fails=PeerError)


@pytest.mark.parametrize(
    ("words", "said", "cure"),
    [
        (["echo", "127.0.0.1", "1"], "Nobody listens on 127.0.0.1:1", "Start the peer"),
        (["echo", "no-such-host.invalid", "104"], "has no address", "host name"),
        (["find", "127.0.0.1", "1"], "Nobody listens", "Start the peer"),
        (["move", "127.0.0.1", "1", "-k", "PatientID=1"], "Nobody listens", "Start the peer"),
    ],
)
def test_a_peer_that_is_away_is_told_in_plain_words(words: list[str], said: str, cure: str) -> None:
    error = radfleet(*words, fails=LinkError).exception
    assert isinstance(error, LinkError)
    assert said in error.message
    assert cure in error.cure


def test_our_own_door_tells_a_stranger_why_it_is_rejected(tmp_path: Path) -> None:
    spool = make_spool(tmp_path)
    door = make_door(spool)
    try:
        error = radfleet("echo", "127.0.0.1", door.port, "--aec", OURS, "--aet", "STRANGER", fails=LinkError).exception
        assert "does not know the calling AE title STRANGER" in str(error)
        error = radfleet(
            "echo", "127.0.0.1", door.port, "--aec", "OTHER", "--aet", "MODALITY", fails=LinkError
        ).exception
        assert "OTHER" in str(error)
    finally:
        door.stop()
        spool.close()


def test_a_peer_that_takes_no_such_object_is_named_and_the_command_fails(tmp_path: Path) -> None:
    port = free_port()
    command = ["storescp", "-aet", "ONE", "--ignore", str(port)]
    child = Child("storescp", command, log=tmp_path / "storescp.log")
    try:
        child.wait_ready("storescp", lambda: listens(port))
        (item,) = radiographs(1)
        item.file_meta.TransferSyntaxUID = pydicom.uid.MPEG4HP41
        item.PixelData = pydicom.encaps.encapsulate([b"no film at all " * 4])
        item["PixelData"].VR, item["PixelData"].is_undefined_length = "OB", True
        paths = write_files(tmp_path / "files", [item, *radiographs(1, first=3)])
        done = radfleet("send", "127.0.0.1", port, *paths, fails=PeerError)
        assert "1 sent, 1 not taken, 0 skipped." in done.output
        assert "MPEG-4" in done.output
    finally:
        child.stop()


@pytest.fixture
def tls_port(tmp_path: Path) -> Iterator[tuple[int, TestAuthority]]:
    """DCMTK's storescp with TLS, which asks for a client certificate of its CA."""
    authority, port = TestAuthority(tmp_path / "ca"), free_port()
    leaf = authority.issue("storescp")
    tls = ["+tls", leaf.key_file, leaf.certificate, "+cf", authority.ca]
    child = Child("storescp", ["storescp", "--ignore", *tls, str(port)], log=tmp_path / "storescp.log")
    child.wait_ready("storescp", lambda: listens(port))
    yield port, authority
    child.stop()


def test_tls_with_a_client_certificate_and_what_is_wrong_without_it(
    tmp_path: Path, tls_port: tuple[int, TestAuthority]
) -> None:
    port, authority = tls_port
    ours = authority.issue("radfleet")
    known = ("--tls", "--ca", authority.ca, "--cert", ours.certificate, "--key", ours.key_file)
    radfleet("echo", "127.0.0.1", port, *known)
    assert "1 sent" in radfleet("send", "127.0.0.1", port, *write_files(tmp_path / "f", radiographs(1)), *known).output
    other = TestAuthority(tmp_path / "other")
    error = radfleet("echo", "127.0.0.1", port, "--tls", "--ca", other.ca, fails=LinkError).exception
    assert "not trusted" in str(error)
    error = radfleet("echo", "127.0.0.1", port, "--tls", "--ca", authority.ca, fails=LinkError).exception
    assert "TLS" in str(error)
    error = radfleet("echo", "127.0.0.1", port, fails=LinkError).exception
    assert "TLS" in str(error)
    radfleet("echo", "127.0.0.1", port, "--tls", fails=ConfigError)
    radfleet("echo", "127.0.0.1", port, "--tls", "--ca", tmp_path / "none.pem", fails=ConfigError)


RULES = """
[dicom]
allow = [{ae_title = "CR*", address = "10.0.0.0/24"}]
[[destination]]
name = "archive"
ae_title = "ARCHIVE"
host = "10.0.0.3"
port = 104
[[rule]]
name = "no screens"
modality = ["OT"]
action = "ignore"
[[rule]]
name = "knees elsewhere"
body_part = ["KNEE"]
action = "forward"
destinations = ["archive"]
priority = "low"
[[rule]]
calling_ae = ["ARCHIVE", "CR*"]
action = "both"
destinations = ["archive"]
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "edge.toml"
    path.write_text(RULES)
    return path


def whatif(config: Path, path: Path, *words: str) -> str:
    return radfleet("whatif", path, "--config", config, *words).output


def test_whatif_tells_the_rule_the_destinations_and_the_head(tmp_path: Path, config: Path) -> None:
    chest, knee = radiographs(2)
    knee.BodyPartExamined = "KNEE"
    paths = write_files(tmp_path / "files", [chest, knee])
    told = whatif(config, paths[0], "--aet", "CR1", "--address", "10.0.0.7")
    for word in (
        "CR1 from 10.0.0.7 is allowed",
        "kept (0x0000)",
        "rule 1 (no screens): modality is DX, not OT",
        "rule 2 (knees elsewhere): body_part is CHEST, not KNEE",
        "rule 3: calling_ae match",
        "both",
        "archive (ARCHIVE at 10.0.0.3:104)",
        "chest-xray",
        "Research use only, not for diagnosis",
    ):
        assert word in told, told
    told = whatif(config, paths[1])
    assert "rule 2 (knees elsewhere): body_part match" in told
    assert "low" in told
    assert "not asked" in told
    told = whatif(config, paths[0], "--aet", "ARCHIVE")
    assert "not back to archive" in told
    assert "rejected: ARCHIVE from 127.0.0.1 is in no [dicom] allow" in told
    assert "rejected: this node is RADFLEET, not OTHER" in whatif(config, paths[0], "--aec", "OTHER")
    told = whatif(config, paths[0])
    assert "no rule matches" in told
    assert not list(tmp_path.glob("state*"))


def test_whatif_tells_what_the_door_refuses(tmp_path: Path, config: Path) -> None:
    (chest,) = radiographs(1)
    (path,) = write_files(tmp_path / "files", [chest])
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    assert "refused with 0xC000" in whatif(config, path)
    path.write_bytes(whole.replace(chest.SOPInstanceUID.encode(), b"9" * len(chest.SOPInstanceUID), 1))
    assert "refused with 0x" in whatif(config, path)
    chest.SOPClassUID = chest.file_meta.MediaStorageSOPClassUID = "1.2.3.4"
    (private,) = write_files(tmp_path / "private", [chest])
    assert "private_classes" in whatif(config, private)
    path.write_bytes(b"")
    assert "not a DICOM file" in whatif(config, path)
    assert "not a DICOM file" in whatif(config, config)


@needs_data
def test_whatif_has_an_answer_for_every_real_object(config: Path) -> None:
    paths = [path for path in sorted((DATA / "dicom" / "singles").rglob("*")) if path.is_file()][:150]
    told = radfleet("whatif", *paths, "--config", config).output
    assert told.count("door") >= len(paths)


@needs_data
def test_hostile_files_end_no_command(config: Path) -> None:
    paths = [path for path in sorted((DATA / "dicom_hostile").rglob("*.dcm")) if path.stat().st_size < 5_000_000][:150]
    assert paths
    radfleet("whatif", *paths, "--config", config)


def test_a_peer_that_hangs_up_over_each_file_is_called_again_for_the_next(tmp_path: Path) -> None:
    with archive(None) as (peer, _):
        paths = write_files(tmp_path / "f", radiographs(3))
        done = radfleet("send", peer.host, peer.port, *paths, "--aec", "ONE", fails=PeerError)
    assert "0 sent, 3 not taken, 0 skipped." in done.output
