"""STOW-RS (PS3.18 10.5): the parts of a request go to the intake process while they arrive, one answer for each.

Memory holds one piece of the network and the start of one object, however large objects and request are.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from io import BytesIO
from typing import Protocol

from msgspec import Struct
from pydicom.filereader import _read_file_meta_info  # reads a group 2 with or without its length

from edge.intake.handover import Answer
from edge.intake.head import DEFLATED
from edge.intake.part import Arriving
from edge.intake.status import STATUS, Outcome
from edge.web.dicomweb.elements import Header, Json
from edge.web.dicomweb.incoming import Event, Incoming, PartBegins, PartData
from edge.web.dicomweb.media import DICOM, content_type
from shared.errors import LinkError, PeerError

TOTAL_BYTES = 8 * 1024 * 1024 * 1024  # of one request
PARTS = 10_000  # of one request
META_BYTES = 64 * 1024  # of an object's preamble and file meta information
STUDY_BYTES = 1024 * 1024  # the study's UID must come within so many bytes where the address names a study
SILENCE_S = 60.0  # a body that brings nothing for so long is given up

# PS3.18 table I.2-2 and PS3.4 table B.2-1
PROCESSING_FAILURE = 0x0110
CANNOT_UNDERSTAND = STATUS[Outcome.NOT_DICOM]
OTHER_STUDY = STATUS[Outcome.MISMATCH]  # the address names another study
_PREAMBLE = 128
_NAME_LENGTH = 128  # no UID is longer than 64: a longer one is refused as none


class TooMuchError(PeerError):
    """The request is longer than TOTAL_BYTES or has more than PARTS parts."""


class SilentError(PeerError):
    """The body brought nothing for SILENCE_S."""


class Sink(Protocol):
    """Where objects go: `edge.intake.handover.Handing`."""

    async def begin(self, arriving: Arriving) -> None: ...
    async def write(self, data: bytes) -> None: ...
    async def finish(self) -> Answer: ...
    async def refuse(self, outcome: Outcome, reason: str) -> Answer: ...


class Result(Struct, frozen=True):
    """What became of one part; the UIDs are empty where the part did not say them."""

    sop_class: str
    sop_instance: str
    answer: Answer


class Stow:
    """One request. `source` completes an `Arriving` from what is known of the caller; `study` is the address's."""

    def __init__(self, sink: Sink, source: Callable[[str, str, str], Arriving], study: str) -> None:
        self.results: list[Result] = []
        self._sink = sink
        self._source = source
        self._study = study
        self._start = bytearray()  # of the current part, until it was announced
        self._arriving: Arriving | None = None
        self._announced = False
        self._refused: tuple[Outcome, str] | None = None  # why the current part goes to the quarantine
        self._answer: Answer | None = None  # a part that has its answer already is read and dropped
        self._away: LinkError | None = None

    async def take(self, chunks: AsyncIterator[bytes], incoming: Incoming) -> None:
        """Reads a request to its end; `results` holds what was decided, also when this raises.

        Raises:
            PeerError: the body is cut, malformed, too long, or silent for SILENCE_S.
            LinkError: the intake process is away and nothing was stored.
        """
        total = 0
        while (chunk := await _next(chunks)) is not None:
            total += len(chunk)
            if total > TOTAL_BYTES:
                raise TooMuchError(f"A request may have {TOTAL_BYTES} bytes.")
            for event in incoming.feed(chunk):
                await self._handle(event)
        incoming.end()
        if self._away is not None and not any(result.answer.stored for result in self.results):
            raise self._away

    async def _handle(self, event: Event) -> None:
        if isinstance(event, PartBegins):
            self._begin(event)
        elif isinstance(event, PartData):
            await self._data(event.data)
        else:
            await self._end()

    def _begin(self, event: PartBegins) -> None:
        if len(self.results) >= PARTS:
            raise TooMuchError(f"A request may have {PARTS} parts.")
        self._start.clear()
        self._arriving, self._announced, self._refused, self._answer = None, False, None, None
        media, _ = content_type(event.headers.get("content-type", DICOM))
        if media != DICOM:
            self._answer = Answer(CANNOT_UNDERSTAND, "refused", "The part is not application/dicom.")

    async def _data(self, data: bytes, *, last: bool = False) -> None:
        if self._answer is not None:
            return
        try:
            if not self._announced:
                self._start += data
                if not self._is_decided(last=last):
                    return
                await self._sink.begin(self._arriving or self._source("", "", ""))
                self._announced, data = True, bytes(self._start)
                self._start.clear()
            await self._sink.write(data)
        except LinkError as exc:
            self._link_lost(exc)

    def _is_decided(self, *, last: bool) -> bool:
        """Tells whether enough came to announce the object, or to refuse it; then `_refused` says why."""
        try:
            if self._arriving is None:
                self._arriving = self._read_meta(last=last)
            return self._arriving is not None and self._study_is_known(self._arriving, last=last)
        except PeerError as exc:
            self._refused = Outcome.NOT_DICOM, exc.message
            return True

    async def _end(self) -> None:
        if not self._announced:
            await self._data(b"", last=True)
        if self._answer is None:
            try:
                self._answer = await (self._sink.refuse(*self._refused) if self._refused else self._sink.finish())
            except LinkError as exc:
                self._link_lost(exc)
        arriving = self._arriving or Arriving("", "", "")
        answer = self._answer or Answer(PROCESSING_FAILURE, "fault")
        self.results.append(Result(arriving.sop_class, arriving.sop_instance, answer))
        self._start.clear()

    def _link_lost(self, exc: LinkError) -> None:
        self._away = exc
        self._answer = Answer(PROCESSING_FAILURE, "fault", exc.message)

    def _read_meta(self, *, last: bool) -> Arriving | None:
        """Returns what the file meta information says and leaves the data set in `_start`; None until it is whole."""
        start, there = self._start, len(self._start)
        if there < _PREAMBLE + 16 and not last:
            return None
        if start[_PREAMBLE : _PREAMBLE + 4] != b"DICM":
            raise PeerError("The part is not a DICOM file.")
        wanted = META_BYTES
        stated = start[_PREAMBLE + 4 : _PREAMBLE + 12] == b"\x02\x00\x00\x00UL\x04\x00"
        if stated:
            wanted = _PREAMBLE + 16 + int.from_bytes(start[_PREAMBLE + 12 : _PREAMBLE + 16], "little")
        if wanted > META_BYTES:
            raise PeerError("The file meta information is too long.")
        if there < wanted and not last:
            return None
        beginning = bytes(start[: META_BYTES * 2])
        names, end = _names(beginning)
        if end >= there and not last and there < META_BYTES * 2:
            return None  # it ended for want of bytes, not at the first element of the data set
        if end == len(beginning):  # an element's odd length may have taken the data set with it
            if not stated or end <= wanted:
                raise PeerError("No data set follows the file meta information.")
            names, end = _names(beginning[:wanted])
        if not all(names):
            raise PeerError("The file meta information does not name class, instance and transfer syntax.")
        del start[:end]
        return self._source(*names)

    def _study_is_known(self, arriving: Arriving, *, last: bool) -> bool:
        """Tells whether the object may be announced, refused or not; False: more of it must be seen first."""
        if not self._study:
            return True
        found = study_of(bytes(self._start), arriving.transfer_syntax, whole=last)
        if not found and not last and len(self._start) < STUDY_BYTES:
            return False
        if found != self._study:
            self._refused = Outcome.MISMATCH, "The object belongs to another study than the address."
        return True


def _names(start: bytes) -> tuple[list[str], int]:
    """Returns SOP class, SOP instance and transfer syntax by the file meta information, and where that ends."""
    file = BytesIO(start)
    file.seek(_PREAMBLE + 4)
    try:
        meta = _read_file_meta_info(file)
        names = [
            str(meta.get(name, "") or "").strip(" \0")[:_NAME_LENGTH]
            for name in ("MediaStorageSOPClassUID", "MediaStorageSOPInstanceUID", "TransferSyntaxUID")
        ]
    except Exception as exc:  # pydicom names no family for damaged input
        raise PeerError("The file meta information cannot be read.") from exc
    return names, file.tell()


def study_of(start: bytes, transfer_syntax: str, *, whole: bool) -> str:
    """Returns the Study Instance UID in the first bytes of a data set, or in a `whole` one; empty when not there."""
    if transfer_syntax == DEFLATED:
        try:
            start = zlib.decompressobj(-zlib.MAX_WBITS).decompress(start, STUDY_BYTES)
        except zlib.error:
            return ""
    try:
        header = Header(BytesIO(start), transfer_syntax, [0x0020000D])
        element = header.element(0x0020000D) if 0x0020000D in header.dataset else None
    except PeerError:
        return ""
    cut = not whole and header.pixels_at >= len(start)  # the value may go on in the next piece
    return "" if element is None or cut else str(element.value or "").strip(" \0")


def response(results: list[Result], urls: dict[str, str], study_url: str, *, cut: bool) -> tuple[int, Json]:
    """Returns status and body (PS3.18 10.5.3, PS3.18 table 10.5.3-1 and annex I.2).

    `urls` are the retrieve URLs of stored instances; `cut` tells that the request broke off after these results.
    """
    stored = [one for one in results if one.answer.stored]
    failed = [one for one in results if not one.answer.stored]
    body: Json = {}
    if study_url and stored:
        body["00081190"] = {"vr": "UR", "Value": [study_url]}
    known = [one for one in failed if one.sop_instance]
    if known:
        body["00081198"] = _sequence([_item(one) | _reason(one.answer.status) for one in known])
    if stored:
        body["00081199"] = _sequence([_item(one) | _retrieve(urls.get(one.sop_instance, "")) for one in stored])
    others = [_reason(one.answer.status) for one in failed if not one.sop_instance]
    others += [_reason(CANNOT_UNDERSTAND)] if cut else []
    if others:
        body["0008119A"] = _sequence(others)
    status = 200 if stored and not failed and not cut else 202 if stored else 409
    return status, body


def _sequence(items: list[Json]) -> Json:
    return {"vr": "SQ", "Value": items}


def _item(result: Result) -> Json:
    return {
        "00081150": {"vr": "UI", "Value": [result.sop_class]},
        "00081155": {"vr": "UI", "Value": [result.sop_instance]},
    }


def _retrieve(url: str) -> Json:
    return {"00081190": {"vr": "UR", "Value": [url]}} if url else {}


def _reason(status: int) -> Json:
    return {"00081197": {"vr": "US", "Value": [status]}}


async def _next(chunks: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await anext(chunks, None)
    except TimeoutError as exc:
        raise SilentError(f"The body brought nothing for {SILENCE_S:g} s.") from exc
