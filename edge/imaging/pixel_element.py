"""The pixel element of an object holds the frames that its header speaks of, and nothing else."""

from __future__ import annotations

import struct
import warnings

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, generate_fragments, generate_frames, parse_basic_offsets
from pydicom.pixels.utils import get_expected_length

from edge.imaging.codestream import Stream, clean_frame
from shared.errors import PeerError

_VRS = {0x7FE00008: {"OF"}, 0x7FE00009: {"OD"}, 0x7FE00010: {"OB", "OW", "OB or OW"}}


def own_pixels(dataset: FileDataset) -> bytes:
    """Cuts native pixels to the length that the header gives, and takes out of compressed ones what is no picture.

    Offset tables are checked or written anew; Extended Offset Tables go.

    Returns:
        The headers of the compressed frames, one after the other.

    Raises:
        PeerError: the frames are not as many as the header says, or not of a form that is looked into.
    """
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if name in dataset:
            delattr(dataset, name)
    _check_palettes(dataset)
    there = [tag for tag in _VRS if tag in dataset]
    if not there:
        return b""
    element = dataset[there[0]]
    if len(there) > 1 or element.VR not in _VRS[there[0]] or not isinstance(element.value, bytes):
        raise PeerError("The object has pixels of more than one kind, or of none that is known.")
    if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
        return _own_frames(dataset, element)
    length = _native_length(dataset, len(element.value))
    if len(element.value) > length + length % 2:
        element.value = element.value[:length] + b"\0" * (length % 2)
    return b""


def _check_palettes(dataset: Dataset) -> None:
    """Raises PeerError when a palette has more bytes than entries of 16 bits (PS3.3 C.7.6.3.1.5)."""
    for data, descriptor in ((0x00281201 + index, 0x00281101 + index) for index in range(4)):
        if data in dataset:
            entries = (int(dataset[descriptor].value[0]) or 65536) if descriptor in dataset else 0
            if len(dataset[data].value or b"") > 2 * entries:
                raise PeerError("The object has a palette of more entries than its header says.")


def _native_length(dataset: Dataset, stored: int) -> int:
    length = get_expected_length(dataset)
    full = length // 2 * 3
    # Not subsampled although it says so: decoders tell it by the length.
    subsampled = dataset.get("PhotometricInterpretation") == "YBR_FULL_422"
    return full if subsampled and stored in (full, full + full % 2) else length


def _own_frames(dataset: FileDataset, element: DataElement) -> bytes:
    many = int(dataset.get("NumberOfFrames") or 1)
    value = element.value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what pydicom warns of is refused below
        fragments = list(generate_fragments(value))[1:]  # the first item is the offset table
        frames = list(generate_frames(value, number_of_frames=many))
    if len(frames) != many or sum(map(len, frames)) != sum(map(len, fragments)):
        raise PeerError("The compressed frames are not as many as the header says.")
    bits = int(dataset.BitsAllocated)
    pixels = (int(dataset.Rows) * int(dataset.Columns) * min(bits, 8) + 7) // 8
    planes = int(dataset.SamplesPerPixel) * max(bits // 8, 1)
    streams = [clean_frame(dataset.file_meta.TransferSyntaxUID, frame, pixels, planes) for frame in frames]
    if not (all(map(_same, frames, streams)) and _tight(value, fragments, frames)):
        element.value = encapsulate([one.data for one in streams])
        element.is_undefined_length = True
    return b"".join(one.header for one in streams)


def _same(frame: bytes, stream: Stream) -> bool:
    return frame in (stream.data, stream.data + b"\0", stream.data + b"\xff")


def _tight(value: bytes, fragments: list[bytes], frames: list[bytes]) -> bool:
    """Whether nothing stands beside fragments and a true offset table; a table may be empty."""
    table = parse_basic_offsets(value)
    parts = 8 + 4 * len(table) + sum(8 + len(one) for one in fragments)
    if struct.unpack_from("<L", value, 4)[0] != 4 * len(table) or len(value) not in (parts, parts + 8):
        return False
    if len(value) != parts and value[parts:] != b"\xfe\xff\xdd\xe0\0\0\0\0":
        return False
    if not table:
        return True
    starts, at, of_frame = [], 0, 0
    for fragment in fragments:
        if of_frame == 0:
            starts.append(at)
        at += 8 + len(fragment)
        of_frame += len(fragment)
        if len(starts) <= len(frames) and of_frame == len(frames[len(starts) - 1]):
            of_frame = 0
    return table == starts
