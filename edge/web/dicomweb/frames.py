"""Single frames of an object: as stored, decoded, or or decoded. At most one frame is in memory at a time.

Every size is checked against the header and the limits below before a decoder allocates anything.
"""

from __future__ import annotations

from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space
from pydicom.tag import BaseTag
from pydicom.uid import UID

from edge.imaging.codestream import sides
from edge.web.dicomweb.elements import PIXELS, Header
from edge.web.dicomweb.media import COMPRESSED, NATIVE
from shared.errors import PeerError
from shared.package.input_spec import MAX_SIDE

Array = npt.NDArray[Any]

FRAME_BYTES = 256 * 1024 * 1024  # of one decoded frame
ENCODED_BYTES = 256 * 1024 * 1024  # of one compressed frame
FRAMES = 100_000
_UNDEFINED = 0xFFFFFFFF
_DESCRIPTION = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "BitsAllocated", "BitsStored", "HighBit",
    "PixelRepresentation", "PhotometricInterpretation", "PlanarConfiguration",
)  # fmt: skip
_MEANING = (
    "PhotometricInterpretation", "BitsStored", "PixelRepresentation", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor",
    "BluePaletteColorLookupTableDescriptor", "RedPaletteColorLookupTableData",
    "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData",
    "SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData",
    "SegmentedBluePaletteColorLookupTableData",
)  # fmt: skip
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_LONG_VRS = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN"}


class NoFrameError(PeerError):
    """The object has no such frame, or none at all."""


class UndecodableError(PeerError):
    """A frame is in an encoding that cannot be decoded here, or is damaged."""


class Pixels:
    """The frames of one object."""

    def __init__(self, header: Header, transfer_syntax: str) -> None:
        """Reads where the pixel data is.

        Raises:
            NoFrameError: the object has no pixel data.
            PeerError: its description is missing or outside of the limits.
        """
        self.header = header
        self.transfer_syntax = transfer_syntax
        self.compressed = transfer_syntax not in NATIVE
        self.tag, vr, self.value_at, self.length = _pixel_element(header)
        self.words = not header.little and vr == b"OW"  # bytes change places, also those of eight bits
        dataset = header.take(_DESCRIPTION)
        self.description = dataset
        self.rows, self.columns = integer(dataset, "Rows"), integer(dataset, "Columns")
        self.frames, self.samples = integer(dataset, "NumberOfFrames", 1) or 1, integer(dataset, "SamplesPerPixel", 1)
        self.bits = {PIXELS[0]: 32, PIXELS[1]: 64}.get(self.tag, integer(dataset, "BitsAllocated"))
        sides = 0 < self.rows <= MAX_SIDE and 0 < self.columns <= MAX_SIDE
        if not (sides and 0 < self.frames <= FRAMES and self.samples in {1, 3, 4} and self.bits in {1, 8, 16, 32, 64}):
            raise PeerError("The description of the pixels is outside of the limits.")
        self.frame_bits = self.rows * self.columns * self.samples * self.bits
        if dataset.get("PhotometricInterpretation") == "YBR_FULL_422" and not self.compressed:
            self.frame_bits = self.frame_bits * 2 // 3
        if self.frame_bits // 8 > FRAME_BYTES:
            raise PeerError(f"A frame would take {self.frame_bits // 8} bytes, the limit is {FRAME_BYTES}.")

    @property
    def media(self) -> str:
        """The media type of a frame as stored; empty where there is none for it."""
        return COMPRESSED.get(self.transfer_syntax, "") if self.compressed else ""

    def stored(self, number: int) -> bytes:
        """Returns a frame, counted from 1, as stored; uncompressed ones in little endian.

        Raises:
            NoFrameError: there is no such frame.
            PeerError: the pixel data is shorter than it says, or damaged.
        """
        if not 1 <= number <= self.frames:
            raise NoFrameError(f"The object has {self.frames} frames, not {number}.")
        if self.compressed:
            return self._encapsulated(number)
        start, end = (number - 1) * self.frame_bits, number * self.frame_bits  # bits
        if self.words and self.bits == 8:
            first_word, last_word = start // 16 * 2, (end + 15) // 16 * 2  # bytes
            swapped = np.frombuffer(self._native(first_word, last_word), ">u2").astype("<u2").tobytes()
            return swapped[start // 8 - first_word : end // 8 - first_word]
        data = self._native(start // 8, (end + 7) // 8)
        if self.bits == 1 and (start % 8 or end % 8):  # frames of single bits may start inside a byte
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")[start % 8 :][: self.frame_bits]
            return np.packbits(bits, bitorder="little").tobytes()
        if not self.header.little and self.bits > 8:
            return np.frombuffer(data, f">u{self.bits // 8}").astype(f"<u{self.bits // 8}").tobytes()
        return data

    def _native(self, start: int, end: int) -> bytes:
        self.header.file.seek(self.value_at + start)
        data = self.header.file.read(end - start)
        if len(data) < end - start:
            raise PeerError("The pixel data is shorter than its description says.")
        return data

    def decoded(self, number: int) -> bytes:
        """Returns a frame as explicit VR little endian holds it; colours of compressed frames as RGB."""
        if not self.compressed:
            return self.stored(number)
        frame = self.array(number)
        return frame.astype(frame.dtype.newbyteorder("<"), copy=False).tobytes()

    def array(self, number: int) -> Array:
        """Returns a frame's stored values, shape (H, W) or, as RGB, (H, W, 3).

        Raises:
            UndecodableError: it cannot be decoded.
        """
        encoded = self.stored(number)
        told = sides(encoded) if self.compressed else None
        if told and told != (self.rows, self.columns):
            raise UndecodableError(f"The frame says {told[0]} x {told[1]} pixels, its description says otherwise.")
        try:
            return self._decode(encoded)
        except Exception as exc:  # pydicom and the codecs name no family
            raise UndecodableError(
                f"The frame cannot be decoded: {type(exc).__name__}.", cure="Ask for it as it is stored."
            ) from exc

    def meaning(self, number: int) -> Dataset:
        """Returns what a frame's values mean; in enhanced objects per frame or shared (PS3.3 C.7.6.16)."""
        found = self.header.take(_MEANING)
        groups = self.header.take(("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"))
        for name, item in (("SharedFunctionalGroupsSequence", 0), ("PerFrameFunctionalGroupsSequence", number - 1)):
            items = groups.get(name)
            for group in _GROUPS if items and item < len(items) else ():
                for values in items[item].get(group) or ():
                    found.update(values)
        return found

    def _decode(self, encoded: bytes) -> Array:
        dataset = self._alone(encoded)
        syntax = dataset.file_meta.TransferSyntaxUID
        if self.tag != PIXELS[2]:
            return np.frombuffer(encoded, "<f4" if self.bits == 32 else "<f8").reshape(self.rows, self.columns)
        array, meta = get_decoder(syntax).as_array(dataset, index=0, raw=True)
        photometric = str(meta.get("photometric_interpretation", ""))
        if photometric.startswith("YBR_FULL"):
            array = convert_color_space(array, photometric, "RGB")
        if array.shape[:2] != (self.rows, self.columns):
            raise PeerError("The frame has another shape than its description says.")
        return np.asarray(array)

    def _alone(self, encoded: bytes) -> Dataset:
        """The object with this one frame."""
        dataset = Dataset()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = UID(self.transfer_syntax if self.compressed else "1.2.840.10008.1.2.1")
        for name in ("BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation"):
            if name in self.description:
                setattr(dataset, name, self.description[name].value)
        if self.samples > 1:
            dataset.PlanarConfiguration = integer(self.description, "PlanarConfiguration")
        dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = self.rows, self.columns, self.samples
        dataset.BitsAllocated, dataset.NumberOfFrames = self.bits, 1
        dataset.PixelData = encapsulate([encoded]) if self.compressed else encoded + b"\0" * (len(encoded) % 2)
        dataset["PixelData"].VR = "OB" if self.compressed or self.bits <= 8 else "OW"
        return dataset

    def _encapsulated(self, number: int) -> bytes:
        file = self.header.file
        file.seek(self.value_at)
        offsets = None
        names = (BaseTag(0x7FE00001), BaseTag(0x7FE00002))  # extended offset table and lengths
        if all(name in self.header.dataset for name in names):
            tables = [self.header.raw(name) for name in names]
            read = [self.header.bytes_of(one) for one in tables if isinstance(one, RawDataElement)]
            offsets = (read[0], read[1])
            file.seek(self.value_at)
        try:
            frame = get_frame(_Bounded(file), number - 1, extended_offsets=offsets, number_of_frames=self.frames)
        except PeerError:
            raise
        except Exception as exc:  # pydicom names no family for damaged input
            raise PeerError(f"The frame cannot be found: {type(exc).__name__}.") from exc
        return frame


def _pixel_element(header: Header) -> tuple[int, bytes, int, int]:
    """Returns tag, VR, start of the value and its length (0xFFFFFFFF: in fragments) of the pixel data element.

    Skips what else is in group 7FE0 before it (the extended offset table).
    """
    file, position = header.file, header.pixels_at
    while True:
        file.seek(position)
        start = file.read(12)
        if len(start) < 8:
            raise NoFrameError("The object has no pixel data.")
        order: Literal["little", "big"] = "little" if header.little else "big"
        tag = int.from_bytes(start[:2], order) << 16 | int.from_bytes(start[2:4], order)
        if header.implicit:
            value_at, length = position + 8, int.from_bytes(start[4:8], order)
        elif start[4:6] in _LONG_VRS:
            value_at, length = position + 12, int.from_bytes(start[8:12], order)
        else:
            value_at, length = position + 8, int.from_bytes(start[6:8], order)
        if tag in PIXELS:
            return tag, b"OW" if header.implicit else start[4:6], value_at, length
        if tag >> 16 != 0x7FE0 or length == _UNDEFINED:
            raise NoFrameError("The object has no pixel data.")
        if tag in {0x7FE00001, 0x7FE00002}:
            header.dataset[tag] = RawDataElement(
                BaseTag(tag), "OV", length, None, value_at, header.implicit, header.little
            )
        position = value_at + length


def integer(dataset: Dataset, name: str, default: int = 0) -> int:
    """Returns an element's first value as an integer."""
    try:
        return int(str(first(dataset.get(name, default))))
    except ValueError:
        return default


def first(value: Any) -> Any:
    """Returns the first of several values, or the one."""
    return (value[0] if len(value) else None) if isinstance(value, MultiValue) else value


class _Bounded:
    """A file from which no more than ENCODED_BYTES are read altogether."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._left = ENCODED_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, length: int = -1) -> bytes:
        if not 0 <= length <= self._left:
            raise PeerError(f"A compressed frame may have {ENCODED_BYTES} bytes.")
        data = self._file.read(length)
        self._left -= len(data)
        return data
