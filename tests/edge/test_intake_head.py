"""The walk through a data set: it agrees with pydicom about what is whole, and no data set makes it slow or large."""

from __future__ import annotations

import random
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import data_element_generator, read_file_meta_info
from pydicom.filewriter import write_dataset

from edge.intake import walk
from edge.intake.head import BIG_ENDIAN, DEFLATED, IMPLICIT, read_head
from edge.intake.walk import CutError, OddError, Walk
from tests.simulators.modality import EXPLICIT
from tests.simulators.real_data import DATA, needs_data

ITEM, ITEM_END, SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
UNDEFINED = 0xFFFFFFFF


def mark(tag: tuple[int, int], length: int = 0, order: str = "<") -> bytes:
    return struct.pack(f"{order}HHL", *tag, length)


def sequence(content: bytes, vr: bytes = b"SQ") -> bytes:
    return struct.pack("<HH2sHL", 0x0008, 0x1140, vr, 0, UNDEFINED) + content + mark(SEQUENCE_END)


def ends(data: bytes, *, implicit: bool = False, little: bool = True) -> list[tuple[int, int]]:
    return [(tag, end) for tag, _, _, end in Walk(data, little=little).elements(0, implicit=implicit)]


def elements(depth: int) -> Callable[[random.Random], Dataset]:
    def make(rng: random.Random) -> Dataset:
        dataset = Dataset()
        dataset.PatientID = "P" * rng.randrange(40)
        dataset.add_new(0x00091001, rng.choice(["UN", "OB"]), rng.randbytes(2 * rng.randrange(40)))
        dataset.StudyDescription = "x" * rng.randrange(5000)
        if depth:
            for tag in (0x00081140, 0x00400275, 0x00091002):
                dataset.add_new(tag, "SQ", [elements(depth - 1)(rng) for _ in range(rng.randrange(3))])
                dataset[tag].is_undefined_length = rng.random() < 0.6
                for item in dataset[tag].value:
                    item.is_undefined_length_sequence_item = rng.random() < 0.6
        if rng.random() < 0.3:
            dataset.add_new(0x7FE00010, "OW", rng.randbytes(2 * rng.randrange(3000)))
        return dataset

    return make


@pytest.mark.parametrize(("implicit", "little"), [(True, True), (False, True), (False, False)])
@given(seed=st.integers(0, 2**32), kept=st.floats(0, 1))
def test_what_pydicom_wrote_is_walked_as_pydicom_walks_it_and_a_cut_is_seen(
    implicit: bool, little: bool, seed: int, kept: float
) -> None:
    out = DicomBytesIO()
    out.is_implicit_VR, out.is_little_endian = implicit, little
    write_dataset(out, elements(3)(random.Random(seed)))
    data = out.getvalue()
    file = BytesIO(data)
    theirs = [(int(one.tag), file.tell()) for one in data_element_generator(file, implicit, little)]
    assert ends(data, implicit=implicit, little=little) == theirs
    cut = data[: int(kept * len(data))]
    try:
        found = ends(cut, implicit=implicit, little=little)
    except CutError:
        return
    assert found == [one for one in theirs if one[1] <= len(cut)]
    assert len(cut) - (found[-1][1] if found else 0) < 8  # what read_head refuses, unless nothing is left


@given(data=st.binary(max_size=300), kind=st.sampled_from([(True, True), (False, True), (False, False)]))
def test_attack_garbage_ends(data: bytes, kind: tuple[bool, bool]) -> None:
    pieces = [mark(ITEM, UNDEFINED), mark(ITEM), mark(ITEM_END), mark(SEQUENCE_END), data[:24], sequence(data[24:])]
    rng = random.Random(data)
    for tail in (b"", b"".join(rng.choices(pieces, k=20))):
        try:
            last = [end for _, end in ends(data + tail, implicit=kind[0], little=kind[1])]
        except (CutError, OddError):
            continue
        assert last == sorted(set(last))
        assert not last or last[-1] <= len(data + tail)


def test_sequences_of_every_kind_are_skipped() -> None:
    short = struct.pack("<HH2sH", 0x0010, 0x0020, b"LO", 2) + b"P1"
    implicit = mark((0x0010, 0x0020), 2) + b"P1"
    explicit_item = mark(ITEM, UNDEFINED) + short + sequence(mark(ITEM)) + mark(ITEM_END)
    for one in (
        sequence(b""),
        sequence(mark(ITEM) + mark(ITEM, len(short)) + short + explicit_item),
        sequence(mark(ITEM, UNDEFINED) + implicit + mark(ITEM_END) + explicit_item),
        sequence(mark(ITEM, UNDEFINED) + implicit + mark(ITEM_END), b"UN"),
        sequence(mark(ITEM, UNDEFINED) + mark((0x0009, 0x1001), UNDEFINED) + mark(SEQUENCE_END) + mark(ITEM_END)),
        sequence(mark(ITEM, 4) + b"\xfe\xff\xdd\xe0" + mark(ITEM, 2) + b"ab", b"OB"),  # fragments
        sequence(b"no fragments at all", b"OB"),
    ):
        assert ends(one + short) == [(0x00081140, len(one)), (0x00100020, len(one + short))]
        for kept in range(8, len(one)):
            if b"\xfe\xff\xdd\xe0" not in one[12:kept]:  # a fragment may hold what looks like the end
                with pytest.raises(CutError):
                    ends(one[:kept])


def test_what_is_unknown_in_big_endian_holds_little_endian() -> None:
    inner = mark(ITEM, UNDEFINED) + mark((0x0010, 0x0020), 2) + b"P1" + mark(ITEM_END) + mark(SEQUENCE_END)
    unknown = struct.pack(">HH2sHL", 0x0008, 0x1140, b"UN", 0, UNDEFINED) + inner
    assert ends(unknown, little=False) == [(0x00081140, len(unknown))]
    outer = struct.pack(">HH2sHL", 0x0008, 0x1140, b"SQ", 0, UNDEFINED) + mark(ITEM, UNDEFINED, ">") + unknown
    outer += mark(ITEM_END, 0, ">") + mark(SEQUENCE_END, 0, ">")
    assert ends(outer, little=False) == [(0x00081140, len(outer))]


def test_attack_a_sequence_of_empty_items_takes_no_memory() -> None:
    data = sequence(mark(ITEM) * 200_000)
    deep = sequence(mark(ITEM, UNDEFINED) * 200_000)
    tracemalloc.start()
    try:
        assert ends(data) == [(0x00081140, len(data))]
        with pytest.raises(OddError, match="nested too deeply"):
            ends(deep)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_attack_depth_and_number_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    nested = sequence(b"")[:12] + mark(ITEM, UNDEFINED)
    closing = mark(ITEM_END) + mark(SEQUENCE_END)
    assert len(ends(nested * walk.DEPTH_LIMIT + closing * walk.DEPTH_LIMIT)) == 1
    with pytest.raises(OddError, match="nested too deeply"):
        ends(nested * (walk.DEPTH_LIMIT + 1) + closing * (walk.DEPTH_LIMIT + 1))
    monkeypatch.setattr(walk, "ELEMENTS_LIMIT", 1000)
    for one in (sequence(mark(ITEM) * 1001), sequence(mark(ITEM) * 1001, b"OB"), mark((0x0009, 0x1001)) * 1001):
        with pytest.raises(OddError, match="too many elements"):
            ends(one)


BETTER = {  # a nested sequence deeper than pydicom's own recursion reaches, and UN that holds little endian
    "dev_nest_200.dcm",
    "dev_nest_2000.dcm",
    "fo-dicom_GH177_D_CLUNIE_CT1_IVRLE_BigEndian_undefined_length.dcm",
}


def objects() -> Iterator[tuple[Path, int, str]]:
    for folder in ("dicom", "dicom_hostile"):
        for path in sorted((DATA / folder).rglob("*")):
            try:
                meta = read_file_meta_info(path)
                yield path, 144 + int(meta.FileMetaInformationGroupLength), str(meta.TransferSyntaxUID)
            except Exception:  # noqa: BLE001, S112 no file of ours
                continue


def by_pydicom(path: Path, offset: int, syntax: str) -> tuple[list[tuple[int, int]], bool]:
    """The top-level elements as pydicom's generator sees them, and whether it came to an end inside of one."""
    data = path.read_bytes()
    file = BytesIO(data)
    file.seek(offset)
    found: list[tuple[int, int]] = []
    warnings.simplefilter("ignore")
    try:
        one: RawDataElement | DataElement
        for one in data_element_generator(file, syntax == IMPLICIT, syntax != BIG_ENDIAN):
            short = isinstance(one, RawDataElement) and one.length != UNDEFINED and len(one.value or b"") < one.length
            if short:
                return found, True
            found.append((int(one.tag), file.tell()))
    except Exception:  # noqa: BLE001 pydicom names no family for damaged input
        return found, True
    rest = data[found[-1][1] if found else offset :]
    return found, len(rest) < 8 and bool(rest.strip(b"\0"))


@needs_data
def test_every_object_of_both_corpora_is_walked_as_by_pydicom() -> None:
    walked, cuts, other = 0, 0, set()
    for path, offset, syntax in objects():
        if syntax == DEFLATED or path.stat().st_size <= offset:
            continue
        walked += 1
        theirs, stopped = by_pydicom(path, offset, syntax)
        mine: list[tuple[int, int]] = []
        try:
            mine.extend(
                (tag, end)
                for tag, _, _, end in Walk(path.read_bytes(), little=syntax != BIG_ENDIAN).elements(
                    offset, implicit=syntax == IMPLICIT
                )
            )
            read_head(path, offset, syntax)
            ended = False
        except (CutError, OddError):
            ended = True
        cuts += ended
        if (mine, ended) != (theirs, stopped) and not (ended and stopped and mine == theirs):
            other.add(path.name)
    assert other <= BETTER, sorted(other - BETTER)
    assert walked > 600
    assert cuts > 20


@needs_data
def test_the_head_of_every_real_object_is_what_pydicom_reads() -> None:
    compared = 0
    for path, offset, syntax in objects():
        if "hostile" in str(path) or syntax not in {IMPLICIT, EXPLICIT}:
            continue
        dataset = pydicom.dcmread(path, force=True, stop_before_pixels=True)
        try:
            head = read_head(path, offset, syntax)
        except CutError:
            continue
        compared += 1
        assert head.sop_instance == str(dataset.get("SOPInstanceUID", "")), path.name
        assert head.series == str(dataset.get("SeriesInstanceUID", "")), path.name
    assert compared > 200


def test_attack_a_fragment_that_reaches_beyond_the_end_is_cut_though_a_delimiter_stands_in_it() -> None:
    pixels = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)
    table = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    fragment = struct.pack("<HHI", 0xFFFE, 0xE000, 5000) + b"\xff\xd8" * 50
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    with pytest.raises(CutError):
        list(Walk(pixels + table + fragment + end, little=True).elements(0, implicit=False))
