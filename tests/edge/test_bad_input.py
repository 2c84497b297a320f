"""Every kind of bad image through the real pipeline: an answer or a reason, in bounded time and memory."""

from __future__ import annotations

import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.sequence import Sequence
from pydicom.uid import UID, JPEG2000Lossless, JPEGLSLossless, RLELossless

from edge.imaging.cell import Limits
from edge.imaging.reading import FRAMES_READ, Reader
from edge.intake.part import Arriving
from edge.results import reading
from scripts.lab.child import peak_bytes
from tests.edge.test_pipeline import Node
from tests.simulators.modality import encoded, phantom_study

CPU_S, MEMORY = 4, 700_000_000  # seconds of one step, bytes of the child's data
CHILD_PEAK = 400_000_000  # bytes resident
SECONDS = 60.0  # at most, on a busy machine, an object that is given up included


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader(Limits(cpu_s=CPU_S, memory_bytes=MEMORY))
    yield made
    made.close()


@pytest.fixture
def node(tmp_path: Path, reader: Reader) -> Node:
    return Node(tmp_path, reader=reader)


def radiograph(seed: int = 1) -> FileDataset:
    return phantom_study("chest-xray", 1, seed=seed)[0]


def ct(slices: int = 6, seed: int = 5) -> list[FileDataset]:
    return phantom_study("chest-ct", 2, seed=seed, slices=slices)


def outcome(node: Node, item: Dataset) -> str:
    """What became of one object: answered, slice, unassessed, quarantined, ignored."""
    intake, results = sqlite3.connect(node.state / "intake.sqlite"), sqlite3.connect(node.results)
    (digest,) = intake.execute("SELECT digest FROM objects WHERE sop_instance = ?", (item.SOPInstanceUID,)).fetchone()
    (found,) = results.execute("SELECT outcome FROM work WHERE digest = ?", (digest,)).fetchone()
    return str(found)


def reason(node: Node) -> str:
    """Why the one object that is not answered is not."""
    kept = [row.reason for row in reading.quarantine(node.results)]
    unread = [row.reason for row in node.worklist() if row.reason]
    (why,) = kept + unread
    return why


def put_bytes(node: Node, item: FileDataset, data: bytes) -> None:
    """Stores a data set's bytes as they are."""
    node.clock.seconds += 0.01
    syntax = str(item.file_meta.TransferSyntaxUID)
    node.spool.store(Arriving(str(item.SOPClassUID), str(item.SOPInstanceUID), syntax, "MODALITY", "", ""), [data])


def not_a_number(item: FileDataset) -> None:
    values = item.pixel_array.astype(np.float32)
    values[3, 3] = np.nan
    del item.PixelData
    item.FloatPixelData, item.BitsAllocated = values.tobytes(), 32
    del item.BitsStored, item.HighBit, item.PixelRepresentation


def infinite(item: FileDataset) -> None:
    item.RescaleSlope, item.RescaleIntercept = "1E+300", 0


def slope_that_is_no_number(item: FileDataset) -> None:
    item["RescaleSlope"] = pydicom.DataElement(0x00281053, "LO", "nan")
    item["RescaleIntercept"] = pydicom.DataElement(0x00281052, "LO", "0")


def one_bit(item: FileDataset) -> None:
    item.PixelData = np.packbits(item.pixel_array > item.pixel_array.mean(), bitorder="little").tobytes()
    item.BitsAllocated = item.BitsStored = 1
    item.HighBit = 0


def palette(item: FileDataset) -> None:
    item.PhotometricInterpretation = "PALETTE COLOR"
    for colour in ("Red", "Green", "Blue"):
        setattr(item, f"{colour}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(item, f"{colour}PaletteColorLookupTableData", np.arange(256, dtype=np.uint16).tobytes())


def colours(photometric: str) -> Callable[[FileDataset], None]:
    def change(item: FileDataset) -> None:
        item.SamplesPerPixel, item.PhotometricInterpretation, item.PlanarConfiguration = 3, photometric, 0
        item.BitsAllocated = item.BitsStored = 8
        item.HighBit = 7
        item.PixelData = bytes(int(item.Rows) * int(item.Columns) * 3)

    return change


def two_frames(item: FileDataset) -> None:
    item.NumberOfFrames, item.PixelData = 2, item.PixelData * 2


def empty(item: FileDataset) -> None:
    item.PixelData = b""


def absent(item: FileDataset) -> None:
    del item.PixelData


def empty_fragments(item: FileDataset) -> None:
    compressed(item, JPEG2000Lossless, [])


def sides(rows: int, columns: int) -> Callable[[FileDataset], None]:
    def change(item: FileDataset) -> None:
        item.Rows, item.Columns = rows, columns

    return change


def compressed(item: FileDataset, syntax: UID, frames: list[bytes]) -> None:
    item.file_meta.TransferSyntaxUID = syntax
    item.PixelData = encapsulate(frames)
    item["PixelData"].VR = "OB"
    item["PixelData"].is_undefined_length = True


def frame_of(item: FileDataset, syntax: UID) -> bytes:
    item.compress(syntax, generate_instance_uid=False)
    return bytes(next(generate_frames(item.PixelData, number_of_frames=1)))


def jpeg2000_bomb(item: FileDataset) -> None:
    """The code stream says 60,000 x 60,000, the header does not."""
    data = bytearray(frame_of(item, JPEG2000Lossless))
    size = data.index(b"\xff\x51")  # SIZ: Lsiz, Rsiz, Xsiz, Ysiz, XOsiz, YOsiz, XTsiz, YTsiz (ISO/IEC 15444-1 A.5.1)
    struct.pack_into(">LL", data, size + 6, 60_000, 60_000)
    struct.pack_into(">LL", data, size + 22, 60_000, 60_000)
    compressed(item, JPEG2000Lossless, [bytes(data)])


def jpeg_ls_bomb(item: FileDataset) -> None:
    data = bytearray(frame_of(item, JPEGLSLossless))
    frame = data.index(b"\xff\xf7")  # SOF55: length, precision, lines, samples a line
    struct.pack_into(">HH", data, frame + 5, 65_535, 65_535)
    compressed(item, JPEGLSLossless, [bytes(data)])


def big_bomb(item: FileDataset) -> None:
    """Header and code stream agree on 8,192 x 8,192, which the limits allow: little comes, much would be taken."""
    jpeg2000_bomb(item)
    data = bytearray(next(generate_frames(item.PixelData, number_of_frames=1)))
    size = data.index(b"\xff\x51")
    struct.pack_into(">LL", data, size + 6, 8_192, 8_192)
    struct.pack_into(">LL", data, size + 22, 8_192, 8_192)
    item.Rows = item.Columns = 8_192
    compressed(item, JPEG2000Lossless, [bytes(data)])


def rle_rubbish(item: FileDataset) -> None:
    compressed(item, RLELossless, [struct.pack("<16L", 2, 64, 2**31, *[0] * 13) + b"\x81\xff" * 5000])


QUARANTINED = {
    "not a number": (not_a_number, "values that are not finite"),
    "infinite after rescale": (infinite, "values that are not finite"),
    "a slope that is no number": (slope_that_is_no_number, "values that are not finite"),
    "one bit": (one_bit, "1 bits allocated are not supported"),
    "empty pixel data": (empty, "0 bytes where the header asks"),
    "no pixel data": (absent, "has no pixel data"),
    "no fragments": (empty_fragments, "cannot be decoded"),
    "65,535 x 65,535": (sides(65_535, 65_535), "outside of the limits"),
    "16,000 x 16,000": (sides(16_000, 16_000), "256000000 pixels, the limit is"),
    "0 x 0": (sides(0, 0), "outside of the limits"),
    "a JPEG 2000 bomb": (jpeg2000_bomb, "60000 x 60000 pixels, the header says otherwise"),
    "a JPEG-LS bomb": (jpeg_ls_bomb, "65535 x 65535 pixels, the header says otherwise"),
    "rubbish in RLE": (rle_rubbish, "cannot be decoded"),
}
SILENT = {
    "palette": (palette, "a colour image is not assessed"),
    "YBR_FULL": (colours("YBR_FULL"), "a colour image is not assessed"),
    "YBR_FULL_422": (colours("YBR_FULL_422"), "a colour image is not assessed"),
    "RGB": (colours("RGB"), "a colour image is not assessed"),
    "two frames": (two_frames, "2 frames in one projection image are not assessed"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it writes for us
@pytest.mark.parametrize("name", QUARANTINED)
def test_attack_what_cannot_be_read_has_a_reason_and_what_is_behind_it_an_answer(
    node: Node, reader: Reader, name: str
) -> None:
    spoil, why = QUARANTINED[name]
    bad, good = radiograph(1), radiograph(2)
    spoil(bad)
    node.put([bad, good])
    began = time.monotonic()
    node.run(after_s=1)
    assert time.monotonic() - began < SECONDS
    assert (outcome(node, bad), outcome(node, good)) == ("quarantined", "answered")
    assert why in reason(node)
    assert peak_bytes(reader.pid) < CHILD_PEAK


@pytest.mark.parametrize("name", SILENT)
def test_what_the_model_was_not_made_for_is_not_assessed_and_says_why(node: Node, reader: Reader, name: str) -> None:
    spoil, why = SILENT[name]
    item, child = radiograph(), reader.pid
    spoil(item)
    node.put([item])
    node.run(after_s=1)
    assert reader.pid == child  # a new one costs a second
    assert (outcome(node, item), reason(node)) == ("unassessed", why)


def plain(_item: FileDataset) -> None:
    """As it is."""


def deep(item: FileDataset) -> None:
    values = item.pixel_array.astype(np.uint32) * 1000
    item.PixelData, item.BitsAllocated, item.BitsStored, item.HighBit = values.tobytes(), 32, 32, 31


def falling(item: FileDataset) -> None:
    """The same image, stored upside down in value, with a slope below zero."""
    values, top = item.pixel_array.astype(np.int64), int(item.pixel_array.max())
    slope, intercept = float(item.get("RescaleSlope", 1)), float(item.get("RescaleIntercept", 0))
    item.PixelData = (top - values).astype(np.uint16).tobytes()
    item.RescaleSlope, item.RescaleIntercept = -slope, intercept + slope * top


def windowless(item: FileDataset) -> None:
    for name in ("WindowCenter", "WindowWidth", "VOILUTSequence"):
        if name in item:
            delattr(item, name)


def absurd_window(item: FileDataset) -> None:
    item.WindowCenter, item.WindowWidth = "0", "0"


ANSWERED = {
    "32 bits": deep,
    "a slope below zero": falling,
    "no window": windowless,
    "a window of no width": absurd_window,
}


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_only_unusual_is_answered_like_the_usual(node: Node, name: str) -> None:
    usual, item = radiograph(1), radiograph(1)
    item.SOPInstanceUID = item.file_meta.MediaStorageSOPInstanceUID = UID(f"{item.SOPInstanceUID}.1")
    ANSWERED[name](item)
    node.put([usual, item])
    node.run()
    rows = [node.record(row.answer) for row in node.worklist()]
    assert [row.reason for row in rows] == ["", ""]
    images = [np.frombuffer(row.image, np.uint8).astype(int) for row in rows]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_a_ct_with_a_slope_below_zero_is_read_in_hounsfield_units(node: Node) -> None:
    usual, turned = ct(seed=5), phantom_study("chest-ct", 2, seed=5, slices=6, patient="P2")
    for item in turned:
        falling(item)
    node.put([*usual, *turned])
    node.run(after_s=1)
    one, two = (node.record(row.answer) for row in node.worklist())
    assert np.allclose(np.frombuffer(one.logits, "<f4"), np.frombuffer(two.logits, "<f4"), atol=1e-3)


def test_a_multi_frame_ct_is_a_series_of_its_frames(node: Node) -> None:
    slices = ct(6)
    item = slices[0]
    item.NumberOfFrames, item.PixelData = 6, b"".join(one.PixelData for one in slices)
    node.put([item])
    node.run(after_s=1)
    (row,) = node.worklist()
    record = node.record(row.answer)
    assert (record.reason, len(record.inputs)) == ("", 6)


def test_more_frames_than_are_held_at_once_are_not_assessed(node: Node) -> None:
    item = ct(1)[0]
    item.Rows = item.Columns = 8
    item.NumberOfFrames, item.PixelData = FRAMES_READ + 1, bytes(2 * 64 * (FRAMES_READ + 1))
    node.put([item])
    node.run(after_s=1)
    assert node.worklist()[0].reason == f"{FRAMES_READ + 1} frames in one object are not assessed"


def test_a_series_of_one_slice_is_answered_by_a_head_that_reads_slices(node: Node) -> None:
    node.put(ct(1))
    node.run(after_s=1)
    (row,) = node.worklist()
    assert (row.reason, row.images) == ("", 1)


def test_a_series_in_two_orientations_is_not_assessed(node: Node) -> None:
    items = ct(6)
    for item in items[:2]:
        item.ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    node.put(items)
    node.run(after_s=1)
    (row,) = node.worklist()
    assert (row.reason, row.images, row.finding) == ("the series mixes 2 orientations", 6, "")


def test_a_series_of_two_kernels_is_not_assessed(node: Node) -> None:
    items = ct(6)
    for number, item in enumerate(items):
        item.ConvolutionKernel = ["B30f", "B70f"][number % 2]
    node.put(items)
    node.run(after_s=1)
    assert node.worklist()[0].reason == "the series mixes 2 reconstruction kernels"


def test_a_tilted_gantry_and_slices_that_do_not_say_mix_nothing(node: Node) -> None:
    items = ct(6)
    for number, item in enumerate(items):
        item.ConvolutionKernel = "B30f" if number % 2 else None
        item.ImageOrientationPatient = [[1, 0, 0, 0, 0.966, -0.259], [1, 0, 0, 0, 1, 0], None][number % 3]
    node.put(items)
    node.run(after_s=1)
    assert node.worklist()[0].reason == ""


def test_frames_of_one_object_in_two_orientations_are_not_assessed(node: Node) -> None:
    slices = ct(2)
    item = slices[0]
    item.NumberOfFrames, item.PixelData = 2, b"".join(one.PixelData for one in slices)
    del item.ImageOrientationPatient
    groups = []
    for axes in ([1, 0, 0, 0, 1, 0], [0, 1, 0, 0, 0, -1]):
        plane, group = Dataset(), Dataset()
        plane.ImageOrientationPatient = axes
        group.PlaneOrientationSequence = Sequence([plane])
        groups.append(group)
    item.PerFrameFunctionalGroupsSequence = Sequence(groups)
    node.put([item])
    node.run(after_s=1)
    assert node.worklist()[0].reason == "the series mixes 2 orientations"


def test_a_localizer_in_a_series_is_left_out_of_it_and_says_why(node: Node) -> None:
    items = ct(6)
    items[0].ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    items[0].ImageOrientationPatient = [1, 0, 0, 0, 0, -1]
    node.put(items)
    node.run(after_s=1)
    assert sorted((row.reason, row.images) for row in node.worklist()) == [("", 5), ("a localizer is not assessed", 1)]


def test_a_blank_series_is_not_assessed(node: Node) -> None:
    items = ct(3)
    for item in items:
        item.PixelData = bytes(len(item.PixelData))
    node.put(items)
    node.run(after_s=1)
    assert node.worklist()[0].reason == "the images are blank"


def test_a_slice_that_cannot_be_read_is_missing_in_the_answer_and_said_there(node: Node) -> None:
    items = ct(6)
    items[2].PixelData = b""
    node.put(items)
    node.run(after_s=1)
    (row,) = node.worklist()
    assert row.images == 5
    assert "1 image could not be read" in node.record(row.answer).complete


def _element(tag: int, vr: bytes, value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<HH2sHL", tag >> 16, tag & 0xFFFF, vr, 0, len(value) if length is None else length) + value


_EMPTY_ITEM, _END = struct.pack("<HHL", 0xFFFE, 0xE000, 0), struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)
NESTED = {
    "items of a sequence without length": _element(0x00080096, b"SQ", _EMPTY_ITEM * 800_000 + _END, 0xFFFFFFFF),
    "items of a sequence that is looked into": _element(0x00082218, b"SQ", _EMPTY_ITEM * 2_000_000),
}


@pytest.mark.parametrize("name", NESTED)
def test_attack_a_million_items_take_bounded_time_and_the_next_object_is_answered(
    node: Node, reader: Reader, name: str
) -> None:
    bomb, good = radiograph(1), radiograph(2)
    if "looked into" in name:
        del bomb.BodyPartExamined
    whole = encoded(bomb)
    at = whole.index(struct.pack("<HH", 0x0010, 0x0010))
    put_bytes(node, bomb, whole[:at] + NESTED[name] + whole[at:])
    node.put([good])
    began = time.monotonic()
    node.run(after_s=1)
    assert time.monotonic() - began < SECONDS
    assert outcome(node, good) == "answered"
    assert outcome(node, bomb) == "quarantined"
    assert "seconds of processor time" in reason(node) or "memory" in reason(node)


def test_attack_a_big_bomb_that_the_limits_allow_is_refused_its_memory(node: Node) -> None:
    bomb, good = radiograph(1), radiograph(2)
    big_bomb(bomb)
    node.put([bomb, good])
    began = time.monotonic()
    node.run(after_s=1)
    assert time.monotonic() - began < SECONDS
    assert (outcome(node, bomb), outcome(node, good)) == ("quarantined", "answered")
