"""DICOMweb over real HTTP on a real spool; `dicomweb-client` is a client that is not ours."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import struct
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pydicom
import pytest
from dicomweb_client import DICOMwebClient
from PIL import Image
from pydicom.dataset import FileDataset
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from edge.intake.part import Arriving
from edge.web.dicomweb.elements import Header, encode_json, to_json
from edge.web.dicomweb.query import parse
from edge.web.dicomweb.retention import Uids
from edge.web.dicomweb.search import Headers, search
from edge.web.labels import MAY
from shared.errors import PeerError
from shared.signin import ROLES
from tests.edge.test_bad_input import jpeg_ls_bomb
from tests.simulators.dicomweb import VIEWER, DicomWebNode
from tests.simulators.modality import EXPLICIT, encoded, phantom_study, split_file
from tests.simulators.real_data import DATA, needs_data

SLICES = 12
CHEST = phantom_study("chest-xray", 0, seed=1, patient="P1")[0]
BRAIN = phantom_study("brain-mri", 0, seed=2, patient="P2", slices=SLICES)
for _slice in BRAIN:
    _slice.StudyDescription = "Head"
ANY = 'multipart/related; type="application/octet-stream"; transfer-syntax="*"'  # OHIF quotes the star


def multiframe() -> FileDataset:
    """Twenty frames of random numbers as RLE, one fragment each, without an offset table."""
    item = phantom_study("chest-xray", 1, seed=7)[0]
    frames = np.random.default_rng(5).integers(0, 4096, (20, 32, 48), dtype=np.uint16)
    item.Rows, item.Columns, item.NumberOfFrames = 32, 48, 20
    item.BitsStored, item.HighBit, item.PixelRepresentation = 12, 11, 0
    item.PixelData = frames.tobytes()
    item.compress(RLELossless, generate_instance_uid=False)
    return item


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DicomWebNode]:
    running = DicomWebNode(tmp_path_factory.mktemp("node")).start()
    chest = pydicom.dcmread(BytesIO(_file(CHEST)))
    chest.PatientName = "Müller^Jürgen"
    chest.SpecificCharacterSet = "ISO_IR 100"
    chest.AccessionNumber = "ACC-77"
    chest.StudyDate = "20240305"
    running.store(chest, *BRAIN)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def token(node: DicomWebNode) -> str:
    return node.token("ada", "radiologist")


@pytest.fixture
def client(node: DicomWebNode, token: str) -> Iterator[httpx.Client]:
    with node.client(token) as one:
        yield one


@pytest.fixture
def foreign(node: DicomWebNode, token: str) -> DICOMwebClient:
    return node.foreign_client(token)


def _file(item: FileDataset) -> bytes:
    out = BytesIO()
    item.save_as(out, enforce_file_format=True)
    return out.getvalue()


def path_of(item: FileDataset) -> str:
    return f"/studies/{item.StudyInstanceUID}/series/{item.SeriesInstanceUID}/instances/{item.SOPInstanceUID}"


def uids(answer: httpx.Response) -> list[str]:
    return [one["0020000D"]["Value"][0] for one in answer.json()] if answer.status_code == 200 else []


class TestSearch:
    def test_studies_tell_what_is_there(self, foreign: DICOMwebClient) -> None:
        found = {one["0020000D"]["Value"][0]: one for one in foreign.search_for_studies()}
        brain = found[BRAIN[0].StudyInstanceUID]
        assert brain["00201208"]["Value"] == [SLICES]
        assert brain["00201206"]["Value"] == [1]
        assert brain["00080061"]["Value"] == ["MR"]
        assert brain["00080056"]["Value"] == ["ONLINE"]
        assert brain["00100020"]["Value"] == ["P2"]
        assert found[CHEST.StudyInstanceUID]["00100010"]["Value"] == [{"Alphabetic": "Müller^Jürgen"}]

    @pytest.mark.parametrize(
        ("question", "chest", "brain"),
        [
            ("", True, True),
            ("PatientID=P1", True, False),
            ("00100020=*1*", True, False),
            ("PatientName=m%C3%BCll*", True, False),
            ("PatientName=*J?rgen", True, False),
            ("PatientName=nobody", False, False),
            ("PatientName=*&PatientID=", True, True),
            ("StudyDate=20240305", True, False),
            ("StudyDate=20240101-20241231", True, False),
            ("StudyDate=20250101-", False, True),
            ("StudyDate=-20240304", False, False),
            ("ModalitiesInStudy=MR", False, True),
            ("ModalitiesInStudy=CT,MR", False, True),
            ("ModalitiesInStudy=CT%5CDX", True, False),
            ("AccessionNumber=ACC-77", True, False),
            ("AccessionNumber=acc-77", False, False),
            (f"StudyInstanceUID={CHEST.StudyInstanceUID}", True, False),
            (f"StudyInstanceUID={CHEST.StudyInstanceUID},{BRAIN[0].StudyInstanceUID}", True, True),
            (f"StudyInstanceUID={CHEST.StudyInstanceUID}%5C{BRAIN[0].StudyInstanceUID}", True, True),
            (f"SeriesInstanceUID={BRAIN[0].SeriesInstanceUID}", False, True),
        ],
    )
    def test_keys_match_as_the_standard_says(
        self, client: httpx.Client, question: str, chest: bool, brain: bool
    ) -> None:
        found = uids(client.get(f"/studies?{question}"))
        assert (CHEST.StudyInstanceUID in found, BRAIN[0].StudyInstanceUID in found) == (chest, brain)

    def test_nothing_found_is_204(self, client: httpx.Client) -> None:
        answer = client.get("/studies?PatientID=nobody")
        assert (answer.status_code, answer.content) == (204, b"")

    def test_what_ohif_asks(self, client: httpx.Client) -> None:
        """The queries of OHIF's DICOMweb data source (its qido.js and retrieveStudyMetadata.js)."""
        studies = client.get(
            "/studies?limit=101&offset=0&fuzzymatching=false&includefield=00081030%2C00080060"
            "&PatientName=*DOE*&StudyDate=20260101-20261231"
        )
        assert uids(studies) == [BRAIN[0].StudyInstanceUID]
        assert studies.json()[0]["00081030"]["Value"] == ["Head"]
        assert studies.json()[0]["00080060"]["Value"] == ["MR"]
        (series,) = client.get(
            f"/studies/{BRAIN[0].StudyInstanceUID}/series?includefield=00080021%2C00080031%2C0008103E%2C00200011"
        ).json()
        assert series["0020000E"]["Value"] == [BRAIN[0].SeriesInstanceUID]
        assert series["00201209"]["Value"] == [SLICES]
        metadata = client.get(f"/studies/{BRAIN[0].StudyInstanceUID}/series/{BRAIN[0].SeriesInstanceUID}/metadata")
        assert metadata.headers["content-type"] == "application/dicom+json"
        assert len(metadata.json()) == SLICES
        for name in ("00280010", "00280030", "00200032", "00200037", "00280100", "7FE00010", "00083002"):
            assert name in metadata.json()[0], name
        frame = client.get(f"{path_of(BRAIN[3])}/frames/1", headers={"Accept": ANY})
        assert frame.status_code == 200
        assert BRAIN[3].PixelData in frame.content

    def test_limit_and_offset_page_through(self, client: httpx.Client) -> None:
        every = client.get("/instances?Modality=MR").json()
        pages = [client.get(f"/instances?Modality=MR&limit=5&offset={at}") for at in (0, 5, 10)]
        assert [len(page.json()) for page in pages] == [5, 5, 2]
        assert [one for page in pages for one in page.json()] == every
        assert "additional results" in pages[0].headers["warning"]
        assert "warning" not in pages[2].headers

    def test_fuzzy_matching_is_answered_with_the_standards_warning(self, client: httpx.Client) -> None:
        answer = client.get("/studies?fuzzymatching=true&PatientID=P1")
        assert uids(answer) == [CHEST.StudyInstanceUID]
        assert answer.headers["warning"].startswith("299 ")
        assert "Only literal matching has been performed" in answer.headers["warning"]

    def test_includefield_brings_what_was_not_there(self, client: httpx.Client) -> None:
        plainly = client.get(f"{path_of(CHEST).rsplit('/', 1)[0]}").json()[0]
        assert "00180015" not in plainly
        asked = client.get(f"{path_of(CHEST).rsplit('/', 1)[0]}?includefield=BodyPartExamined,00281050").json()[0]
        assert asked["00180015"]["Value"] == [CHEST.BodyPartExamined]
        everything = client.get("/studies?includefield=all&PatientID=P1").json()[0]
        assert everything["00080060"]["Value"] == [CHEST.Modality]

    @pytest.mark.parametrize("question", ["Nonsense=1", "limit=-1", "limit=x", "offset=1.5", "includefield=Nonsense"])
    def test_a_bad_question_is_400(self, client: httpx.Client, question: str) -> None:
        assert client.get(f"/studies?{question}").status_code == 400

    def test_a_key_that_is_not_supported_is_ignored_and_said(self, client: httpx.Client) -> None:
        answer = client.get("/studies?PatientID=P1&PixelSpacing=1&0040A043.00080100=x")
        assert uids(answer) == [CHEST.StudyInstanceUID]
        assert "PixelSpacing is not supported" in answer.headers["warning"]

    def test_attack_wildcards_cost_no_time(self, client: httpx.Client) -> None:
        answer = client.get("/studies", params={"PatientName": "*a" * 90 + "?b"}, timeout=5)
        assert answer.status_code == 204


def test_a_study_of_a_thousand_instances_lists_in_seconds(tmp_path: Path) -> None:
    """The second time from memory; the bounds are wide, a machine may be busy."""
    node = DicomWebNode(tmp_path)
    item = phantom_study("chest-xray", 0, seed=1)[0]
    item.PixelData, item.Rows, item.Columns = bytes(2), 1, 1
    own = item.SOPInstanceUID.encode()
    start = encoded(item)
    length = len(own) + len(own) % 2
    for number in range(1000):
        uid = f"2.25.{10 ** (len(own) - 6) + number}".encode().ljust(length, b"\0")
        arriving = Arriving(str(item.SOPClassUID), uid.decode().rstrip("\0"), EXPLICIT)
        node.spool.store(arriving, [start.replace(own.ljust(length, b"\0"), uid)])
    headers = Headers(node.retention)
    query = parse("instances", [("limit", "5000")])
    times = []
    for _ in range(2):
        began = time.monotonic()
        assert len(search(node.retention, headers, query, Uids((item.StudyInstanceUID,)), "").results) == 1000
        times.append(time.monotonic() - began)
    assert times[0] < 6
    assert times[1] < 0.5
    (study,) = search(node.retention, headers, parse("studies", []), Uids(), "").results
    assert study["00201208"]["Value"] == [1000]
    node.labels.close()
    node.spool.close()


class TestRetrieve:
    def test_instances_come_back_as_they_were_stored(self, foreign: DICOMwebClient, client: httpx.Client) -> None:
        item = BRAIN[5]
        back = foreign.retrieve_instance(item.StudyInstanceUID, item.SeriesInstanceUID, item.SOPInstanceUID)
        assert encoded(back) == encoded(item)
        series = foreign.retrieve_series(item.StudyInstanceUID, item.SeriesInstanceUID)
        assert {one.SOPInstanceUID for one in series} == {one.SOPInstanceUID for one in BRAIN}
        single = client.get(path_of(item), headers={"Accept": "application/dicom"})
        assert single.headers["content-type"].startswith("application/dicom")
        assert single.content.endswith(encoded(item))

    def test_metadata_is_what_pydicom_says(self, node: DicomWebNode, foreign: DICOMwebClient) -> None:
        found = foreign.retrieve_instance_metadata(*_ids(CHEST))
        uri = found["7FE00010"]["BulkDataURI"]
        mine = pydicom.Dataset.from_json(found, lambda _tag, _vr, _uri: b"")
        assert mine.BodyPartExamined == CHEST.BodyPartExamined
        assert list(mine.ImageType) == list(CHEST.ImageType)
        assert uri.endswith(f"{path_of(CHEST)}/bulkdata/7FE00010")
        here = f"{node.url}/dicom-web{uri.partition('/dicom-web')[2]}"  # this client's Host header names no port
        assert foreign.retrieve_bulkdata(here)[0] == CHEST.PixelData

    @pytest.mark.parametrize("accept", ["text/html", "application/dicom; transfer-syntax=1.2.840.10008.1.2.4.90"])
    def test_what_is_not_acceptable_is_406(self, client: httpx.Client, accept: str) -> None:
        assert client.get(path_of(CHEST), headers={"Accept": accept}).status_code == 406

    @pytest.mark.parametrize(
        "path", ["/studies/1.2", "/studies/1.2/metadata", f"{path_of(CHEST)}9", "/studies/'/series/x"]
    )
    def test_what_is_not_kept_is_404(self, client: httpx.Client, path: str) -> None:
        assert client.get(path).status_code == 404

    def test_compressed_frames_come_as_stored_or_decoded(self, node: DicomWebNode, client: httpx.Client) -> None:
        item = multiframe()
        node.store(item)
        frames = pydicom.pixels.pixel_array(pydicom.dcmread(BytesIO(_file(item))))
        path = f"{path_of(item)}/frames"
        single = client.get(f"{path}/20", headers={"Accept": "application/octet-stream"})
        assert single.content == frames[19].tobytes()
        assert single.headers["content-type"].endswith("transfer-syntax=1.2.840.10008.1.2.1")
        stored = client.get(f"{path}/3", headers={"Accept": "image/dicom-rle"})
        assert stored.content == pydicom.encaps.get_frame(item.PixelData, 2, number_of_frames=20)
        both = client.get(f"{path}/7,2", headers={"Accept": ANY})
        assert both.content.index(
            pydicom.encaps.get_frame(item.PixelData, 6, number_of_frames=20)
        ) < both.content.index(pydicom.encaps.get_frame(item.PixelData, 1, number_of_frames=20))
        assert "transfer-syntax=1.2.840.10008.1.2.5" in both.text[:200]
        assert client.get(f"{path}/21", headers={"Accept": ANY}).status_code == 404
        assert client.get(f"{path}/1,2", headers={"Accept": "application/octet-stream"}).status_code == 406
        assert client.get(f"{path}/1", headers={"Accept": "image/jpeg"}).status_code == 406
        assert client.get(f"{path}/x").status_code == 400
        whole = client.get(
            path_of(item), headers={"Accept": "application/dicom"}
        )  # the default: explicit little endian
        np.testing.assert_array_equal(pydicom.dcmread(BytesIO(whole.content)).pixel_array, frames)

    def test_attack_an_object_that_decodes_to_too_much_is_given_as_stored_or_not(
        self, node: DicomWebNode, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        item = phantom_study("chest-xray", 1, seed=31)[0]
        item.PixelData, item.NumberOfFrames = bytes(len(item.PixelData) * 20), 20
        item.compress(RLELossless, generate_instance_uid=False)
        node.store(item)
        limit = len(item.PixelData) * 2  # twenty black frames are much smaller than decoded
        monkeypatch.setattr("edge.web.dicomweb.decoding.TRANSCODED_BYTES", limit)
        whole = client.get(path_of(item), headers={"Accept": "application/dicom"})
        assert whole.headers["content-type"].endswith("transfer-syntax=1.2.840.10008.1.2.5")
        explicit = "application/dicom; transfer-syntax=1.2.840.10008.1.2.1"
        assert client.get(path_of(item), headers={"Accept": explicit}).status_code == 406
        monkeypatch.undo()
        assert client.get(path_of(item), headers={"Accept": explicit}).status_code == 200

    def test_attack_a_frame_that_is_larger_than_its_description_is_not_decoded(
        self, node: DicomWebNode, client: httpx.Client
    ) -> None:
        item = phantom_study("chest-xray", 1, seed=32)[0]
        jpeg_ls_bomb(item)
        node.store(item)
        path = f"{path_of(item)}"
        explicit = "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
        for answer in (
            client.get(f"{path}/frames/1", headers={"Accept": explicit}),
            client.get(f"{path}/rendered"),
        ):
            assert answer.status_code == 406
            assert "65535 x 65535" in answer.json()["error"]
        assert client.get(f"{path}/frames/1", headers={"Accept": "image/jls"}).status_code == 200

    def test_attack_a_header_of_millions_of_items_is_refused_before_it_is_built(self) -> None:
        item = struct.pack("<HHL", 0xFFFE, 0xE000, 0)
        begin = struct.pack("<HH2sHL", 0x0008, 0x0096, b"SQ", 0, 0xFFFFFFFF)
        bomb = begin + item * 1_500_000 + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
        began = time.process_time()
        with pytest.raises(PeerError, match="too many elements"):
            Header(BytesIO(bomb), EXPLICIT)
        assert time.process_time() - began < 10

    def test_a_decoder_that_died_is_replaced_and_the_page_stays(self, node: DicomWebNode, client: httpx.Client) -> None:
        item = phantom_study("chest-xray", 1, seed=33)[0]
        item.compress(RLELossless, generate_instance_uid=False)
        node.store(item)
        assert client.get(f"{path_of(item)}/rendered").status_code == 200
        children = {one.pid for one in multiprocessing.active_children()}
        assert children
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        assert client.get(f"{path_of(item)}/rendered").status_code == 200

    def test_big_endian_pixels_are_turned(self, node: DicomWebNode, client: httpx.Client) -> None:
        item = phantom_study("chest-xray", 0, seed=11)[0]
        pixels = item.pixel_array
        item.PixelData = pixels.astype(">u2").tobytes()
        buffer = pydicom.filebase.DicomBytesIO()
        buffer.is_little_endian, buffer.is_implicit_VR = False, False
        pydicom.filewriter.write_dataset(buffer, item)
        node.spool.store(
            Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), str(ExplicitVRBigEndian)), [buffer.getvalue()]
        )
        frame = client.get(f"{path_of(item)}/frames/1", headers={"Accept": "application/octet-stream"})
        assert frame.content == pixels.tobytes()
        whole = pydicom.dcmread(BytesIO(client.get(path_of(item), headers={"Accept": "application/dicom"}).content))
        np.testing.assert_array_equal(whole.pixel_array, pixels)

    def test_rendered_pictures_obey_window_viewport_and_type(self, client: httpx.Client) -> None:
        path = f"{path_of(CHEST)}/rendered"
        default = client.get(path)
        assert default.headers["content-type"] == "image/jpeg"
        png = client.get(path, headers={"Accept": "image/png"})
        picture = Image.open(BytesIO(png.content))
        assert (png.headers["content-type"], picture.size) == ("image/png", (CHEST.Columns, CHEST.Rows))
        small = Image.open(BytesIO(client.get(f"{path}?viewport=100,60").content))
        assert max(small.size) <= 100
        assert small.size[1] == 60
        black = np.asarray(Image.open(BytesIO(client.get(f"{path}?window=1000000,10&accept=image/png").content)))
        white = np.asarray(Image.open(BytesIO(client.get(f"{path}?window=-1000000,10&accept=image/png").content)))
        assert {int(black.max()), int(white.min())} == {0, 255}
        thumbnail = Image.open(BytesIO(client.get(f"{path_of(CHEST)}/thumbnail").content))
        assert max(thumbnail.size) == 128
        for wrong in ("window=1,0", "window=x", "viewport=0,5", "viewport=1e9,1", "quality=x"):
            assert client.get(f"{path}?{wrong}").status_code == 400, wrong
        assert client.get(path, headers={"Accept": "image/gif"}).status_code == 406
        series = client.get(f"/studies/{BRAIN[0].StudyInstanceUID}/rendered")
        assert series.content.count(b"Content-Type: image/jpeg") == SLICES

    def test_a_damaged_object_does_not_hide_its_series(self, node: DicomWebNode, client: httpx.Client) -> None:
        item = phantom_study("chest-xray", 0, seed=21)[0]
        item.add_new(0x00181114, "DS", "1.5")
        node.store(item)
        database_row = node.retention.one(*_ids(item))
        path = node.retention.path(database_row)
        whole = path.read_bytes()
        path.write_bytes(whole[: database_row.offset] + b"\xff" * 40)
        (found,) = client.get(f"{path_of(item)}/metadata").json()
        assert found["00080018"]["Value"] == [item.SOPInstanceUID]
        assert client.get(f"{path_of(item)}/frames/1").status_code in {400, 404}
        path.write_bytes(whole)
        assert client.get(f"{path_of(item)}/frames/1").status_code == 200


class TestRights:
    @pytest.mark.parametrize(
        ("method", "path", "action"),
        [
            ("GET", "/studies", "study.read"),
            ("GET", f"/studies/{CHEST.StudyInstanceUID}/metadata", "study.read"),
            ("GET", path_of(CHEST), "study.read"),
            ("GET", f"{path_of(CHEST)}/frames/1", "study.read"),
            ("GET", f"{path_of(CHEST)}/rendered", "study.read"),
            ("POST", "/studies", "study.store"),
        ],
    )
    def test_each_role_may_do_what_the_table_says(
        self, node: DicomWebNode, method: str, path: str, action: str
    ) -> None:
        with node.client("") as stranger:
            answer = stranger.request(method, path)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for role in ROLES:
            with node.client(node.token(f"one {role}", role)) as one:
                status = one.request(method, path).status_code
            assert (status != 403) == (role in MAY[action]), (role, status)  # type: ignore[index]

    def test_only_the_named_viewers_may_ask_from_a_browser(self, node: DicomWebNode, client: httpx.Client) -> None:
        def allowed(path: str, origin: str, method: str = "GET") -> str:
            headers = {"Origin": origin, "Access-Control-Request-Method": "GET"}
            answer = client.request(method, f"{node.url}{path}", headers=headers)
            assert "access-control-allow-credentials" not in answer.headers  # a bearer token, never the cookie
            return str(answer.headers.get("access-control-allow-origin", ""))

        assert allowed("/dicom-web/studies", VIEWER) == VIEWER
        assert allowed("/dicom-web/studies", VIEWER, "OPTIONS") == VIEWER
        assert allowed("/dicom-web/studies", "https://other.example") == ""
        assert allowed("/api/worklist", VIEWER) == ""
        assert allowed("/login", VIEWER) == ""


@needs_data
@pytest.mark.filterwarnings("ignore")  # pydicom warns about much of the corpus
def test_plain_values_are_what_pydicom_makes_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every header of the corpus, both ways; they may differ in padding inside of several values."""
    seen = 0
    for path in sorted((DATA / "dicom" / "singles").rglob("*.dcm")):
        try:
            _, _, syntax, data = split_file(path)
            quick = to_json(Header(BytesIO(data), syntax), str)
        except (PeerError, pydicom.errors.InvalidDicomError, AttributeError, KeyError):
            continue
        with monkeypatch.context() as patched:
            patched.setattr("edge.web.dicomweb.elements.plain", lambda _raw: None)
            slow = to_json(Header(BytesIO(data), syntax), str)
        for name, value in slow.items():
            assert _tidy(quick[name]) == _tidy(value), (path.name, name)
            seen += 1
    assert seen > 10_000


def _tidy(value: dict[str, Any]) -> Any:
    return json.loads(re.sub(r' +"', '"', encode_json(value).decode()))


def _ids(item: FileDataset) -> tuple[str, str, str]:
    return str(item.StudyInstanceUID), str(item.SeriesInstanceUID), str(item.SOPInstanceUID)


@needs_data
@pytest.mark.filterwarnings("ignore")  # pydicom warns about much of the corpus
def test_every_real_object_is_served_or_refused_with_a_reason(tmp_path: Path) -> None:
    """Metadata, a frame and a picture of everything in the folder: pixels are those that pydicom decodes."""
    node = DicomWebNode(tmp_path).start()
    counts = {"pictures": 0, "frames": 0, "refused": 0}
    try:
        token = node.token("ada", "radiologist")
        sources = {}
        for path in sorted((DATA / "dicom" / "singles").rglob("*.dcm")):
            try:
                sources |= {split_file(one)[1]: one for one in node.store_files([path])}
            except Exception:  # noqa: BLE001, S112 not a file that could be sent
                continue
        with node.client(token) as client:
            for found in client.get("/instances?limit=1000").json():
                _look_at(client, found, sources, counts)
    finally:
        node.stop()
    assert counts["pictures"] > 100
    assert counts["frames"] > 80


def _look_at(client: httpx.Client, found: dict[str, Any], sources: dict[str, Path], counts: dict[str, int]) -> None:
    path = found["00081190"]["Value"][0].partition("/dicom-web")[2]
    (metadata,) = client.get(f"{path}/metadata").json()
    assert metadata["00080018"] == found["00080018"]
    frame = client.get(f"{path}/frames/1", headers={"Accept": "application/octet-stream"})
    picture = client.get(f"{path}/rendered")
    assert picture.status_code in {200, 400, 404, 406}, picture.text
    counts["pictures"] += picture.status_code == 200
    if frame.status_code != 200:
        counts["refused"] += 1
        assert frame.json()["error"]
        return
    item = pydicom.dcmread(sources[found["00080018"]["Value"][0]])
    if item.get("BitsAllocated") in {8, 16} and "PixelData" in item and int(item.get("NumberOfFrames") or 1) == 1:
        photometric = item.PhotometricInterpretation
        if item.file_meta.TransferSyntaxUID.is_compressed or not photometric.startswith("YBR"):
            expected = item.pixel_array
            if item.get("PlanarConfiguration") and not item.file_meta.TransferSyntaxUID.is_compressed:
                expected = np.moveaxis(expected, -1, 0)
            expected = expected.astype(expected.dtype.newbyteorder("<"))
            assert frame.content.rstrip(b"\0") == expected.tobytes().rstrip(b"\0"), path
            counts["frames"] += 1


@needs_data
@pytest.mark.filterwarnings("ignore")
def test_attack_hostile_objects_get_an_answer_and_harm_nobody(tmp_path: Path) -> None:
    """Whatever of the hostile folder the spool keeps: every request ends, with a status that blames no server."""
    node = DicomWebNode(tmp_path).start()
    asked = 0
    try:
        token = node.token("ada", "radiologist")
        for path in sorted((DATA / "dicom_hostile").rglob("*")):
            if path.is_file() and path.suffix not in {".md", ".csv"}:
                with contextlib.suppress(Exception):  # not a file that could be sent, or refused by the spool
                    node.store_files([path])
        with node.client(token) as client:
            assert client.get("/series?includefield=all").status_code == 200
            for kept in node.retention.instances(Uids()):
                base = f"/studies/{kept.study}/series/{kept.series}/instances/{kept.sop_instance}"
                for path in ("", "/metadata", "/frames/1", "/rendered", "/bulkdata/7FE00010"):
                    answer = client.get(base + path, timeout=30)
                    assert answer.status_code in {200, 400, 404, 406}, (base, path)
                    asked += 1
    finally:
        node.stop()
    assert asked > 500
