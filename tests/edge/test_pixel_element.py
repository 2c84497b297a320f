"""What stands beside the picture in the pixel element does not come through; the picture does."""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import UID, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from edge.imaging.deidentify import deidentify
from shared.errors import PeerError
from tests.edge.test_deidentify import KEY, cleaned, ct, stored

TEXT = b"SMITH JOHN 1950-01-01 PID 5"
PICTURE = (np.arange(4096) % 251).astype(np.uint8).reshape(64, 64)
SEGMENT = struct.pack(">H", len(TEXT) + 2) + TEXT


def grey(pixels: bytes, syntax: str = "", frames: int = 1) -> FileDataset:
    """A CT image of 64 by 64 pixels of 8 bits about a Smith, whose header vouches for it."""
    item = ct()
    item.PatientName, item.PatientID, item.PatientBirthDate = "Smith^John", "PID-778812", "19500101"
    item.BitsAllocated = item.BitsStored = 8
    item.HighBit, item.Rows, item.Columns = 7, 64, 64
    item.NumberOfFrames = frames
    item.PixelData = pixels
    item["PixelData"].VR = "OB"
    if syntax:
        item.file_meta.TransferSyntaxUID = UID(syntax)
        item["PixelData"].is_undefined_length = True
    return item


def jpeg() -> bytes:
    return bytes(cv2.imencode(".jpg", PICTURE)[1])


def j2k() -> bytes:
    item = grey(PICTURE.tobytes())
    item.compress(JPEG2000Lossless, generate_instance_uid=False)
    return next(generate_frames(item.PixelData, number_of_frames=1))


def rle() -> bytes:
    item = grey(PICTURE.tobytes())
    item.compress(RLELossless, generate_instance_uid=False)
    return next(generate_frames(item.PixelData, number_of_frames=1))


def after(data: bytes, at: bytes, insert: bytes) -> bytes:
    """The bytes with an insertion after the first place where `at` stands."""
    end = data.index(at) + len(at)
    return data[:end] + insert + data[end:]


def holds(item: FileDataset) -> np.ndarray[Any, Any]:
    """The picture of the result, in which no text of the patient stands."""
    result, data = cleaned(item)
    assert b"SMITH" not in data.upper()
    assert b"1950" not in data
    return result.pixel_array


@pytest.mark.parametrize("more", [TEXT, TEXT.ljust(4096, b"\0")], ids=["a line", "a frame"])
def test_attack_native_pixels_beyond_the_last_frame_are_cut(more: bytes) -> None:
    assert np.array_equal(holds(grey(PICTURE.tobytes() + more)), PICTURE)
    two = grey(PICTURE.tobytes() * 2 + more, frames=2)
    assert holds(two).shape == (2, 64, 64)


def test_pixels_that_fit_stay_with_their_padding() -> None:
    item = grey(PICTURE.tobytes()[:49] + b"\0")
    item.Rows = item.Columns = 7
    assert cleaned(item)[0].PixelData == item.PixelData
    for syntax, frame in ((JPEGBaseline8Bit, jpeg()), (RLELossless, rle())):
        item = grey(encapsulate([frame]), syntax)
        assert cleaned(item)[0].PixelData == stored(item).PixelData


@pytest.mark.parametrize("kind", [0xFE, *range(0xE0, 0xF0)])
def test_attack_comments_and_application_data_of_jpeg_go(kind: int) -> None:
    frame = after(jpeg(), b"\xff\xd8", bytes([0xFF, kind]) + SEGMENT)
    plain = pydicom.pixel_array(stored(grey(encapsulate([jpeg()]), JPEGBaseline8Bit)))
    assert np.array_equal(holds(grey(encapsulate([frame]), JPEGBaseline8Bit)), plain)


@pytest.mark.parametrize("prefix", [b"JFIF\0\1\1\0\0\1\0\1\x05\x05", b"Adobe\0\x64", b"mrfx"])
def test_attack_application_data_that_decoders_read_has_its_length(prefix: bytes) -> None:
    kind = {b"J": 0xE0, b"A": 0xEE, b"m": 0xE8}[prefix[:1]]
    body = prefix + TEXT
    frame = after(jpeg(), b"\xff\xd8", bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body)
    holds(grey(encapsulate([frame]), JPEGBaseline8Bit))


def test_jfif_stays() -> None:
    assert b"JFIF" in jpeg()
    assert b"JFIF" in cleaned(grey(encapsulate([jpeg() + TEXT]), JPEGBaseline8Bit))[0].PixelData


@pytest.mark.parametrize(("syntax", "frame"), [(JPEGBaseline8Bit, jpeg), (JPEG2000Lossless, j2k), (RLELossless, rle)])
def test_attack_what_follows_the_end_of_a_frame_goes(syntax: str, frame: Any) -> None:
    plain = pydicom.pixel_array(stored(grey(encapsulate([frame()]), syntax)))
    assert np.array_equal(holds(grey(encapsulate([frame() + TEXT]), syntax)), plain)
    assert np.array_equal(holds(grey(encapsulate([frame(), frame()], has_bot=False), syntax)), plain)
    two = encapsulate([frame() + TEXT, frame()])
    assert np.array_equal(holds(grey(two, syntax, frames=2)), np.stack([plain, plain]))


def test_attack_comments_of_jpeg_2000_go_and_those_in_tiles_are_refused() -> None:
    comment = b"\xff\x64" + struct.pack(">HH", len(TEXT) + 4, 1) + TEXT
    size = j2k().index(b"\xff\x52")
    frame = j2k()[:size] + comment + j2k()[size:]
    assert np.array_equal(holds(grey(encapsulate([frame]), JPEG2000Lossless)), PICTURE)
    tile = j2k().index(b"\xff\x90") + 12
    length = int.from_bytes(j2k()[tile - 6 : tile - 2], "big") + len(comment)
    inside = j2k()[: tile - 6] + length.to_bytes(4, "big") + j2k()[tile - 2 : tile] + comment + j2k()[tile:]
    with pytest.raises(PeerError, match="inside of a tile"):
        deidentify(stored(grey(encapsulate([inside]), JPEG2000Lossless)), KEY)


def test_attack_bytes_between_the_segments_of_rle_are_refused() -> None:
    frame = rle()
    moved = struct.pack("<LL", 1, 64 + len(TEXT) + 1) + frame[8:64] + TEXT + b"\0" + frame[64:]
    with pytest.raises(PeerError, match="transfer syntax asks"):
        deidentify(stored(grey(encapsulate([moved]), RLELossless)), KEY)


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_attack_frames_are_as_many_as_the_header_says(frames: int) -> None:
    """With an offset table that tells of three: a third picture is never carried beside one or two."""
    other = after(jpeg(), b"\xff\xd8", b"\xff\xfe" + SEGMENT)
    item = stored(grey(encapsulate([jpeg(), jpeg(), other]), JPEGBaseline8Bit, frames=frames))
    with pytest.raises(PeerError, match="not as many"):
        deidentify(item, KEY)


def test_attack_offset_tables_hold_offsets() -> None:
    frame = encapsulate([jpeg()], has_bot=False)[8:]
    told = TEXT + b"\0"
    item = grey(b"\xfe\xff\x00\xe0" + struct.pack("<L", len(told)) + told + frame, JPEGBaseline8Bit)
    try:
        holds(item)
    except PeerError as refused:
        assert "many" in refused.message or "de-identified" in refused.message  # noqa: PT017 either end is safe
    item = grey(encapsulate([jpeg()]), JPEGBaseline8Bit)
    item.add_new(0x7FE00001, "OV", TEXT[:24])
    item.add_new(0x7FE00002, "OV", TEXT[:24])
    holds(item)


def test_attack_a_palette_holds_its_entries() -> None:
    item = grey(PICTURE.tobytes())
    for index in range(3):
        item.add_new(0x00281101 + index, "US", [16, 0, 16])
        item.add_new(0x00281201 + index, "OW", b"\0\1" * 16)
    assert len(cleaned(item)[0].RedPaletteColorLookupTableData) == 32
    more, lost = stored(item), stored(item)
    more.BluePaletteColorLookupTableData += TEXT + b"\0"
    del lost.BluePaletteColorLookupTableDescriptor
    for one in (more, lost):
        with pytest.raises(PeerError, match="palette"):
            deidentify(one, KEY)


def test_attack_a_second_kind_of_pixels_and_unknown_streams_are_refused() -> None:
    item = grey(PICTURE.tobytes())
    item.add_new("FloatPixelData", "OF", TEXT + b"\0")
    with pytest.raises(PeerError, match="more than one kind"):
        deidentify(stored(item), KEY)
    item = grey(encapsulate([b"\0\0\1\xb3" + TEXT]), "1.2.840.10008.1.2.4.100")  # MPEG2
    with pytest.raises(PeerError, match="not looked into"):
        deidentify(stored(item), KEY)


@pytest.mark.parametrize("name", [b"Smith", b"smith", b"SMITH", b"01.01.1950", b"pid-778812"])
def test_attack_a_name_among_compressed_pixels_is_refused_whatever_its_case(name: bytes) -> None:
    frame = jpeg()[:-2] + name + jpeg()[-2:]  # after the last pixel, where no decoder looks
    with pytest.raises(PeerError, match="inside of the compressed pixels"):
        deidentify(stored(grey(encapsulate([frame]), JPEGBaseline8Bit)), KEY)


def test_attack_a_short_name_in_a_table_is_refused() -> None:
    table = bytes([0xFF, 0xDB]) + struct.pack(">H", 67) + b"\x0f" + b"Lee".ljust(64, b"\1")
    item = grey(encapsulate([after(jpeg(), b"\xff\xd8", table)]), JPEGBaseline8Bit)
    item.PatientName = "LEE^X"
    with pytest.raises(PeerError, match="inside of the compressed pixels"):
        deidentify(stored(item), KEY)
