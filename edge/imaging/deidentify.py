"""De-identification by PS3.15 Annex E: a data set in, a new one out, and nothing of the patient left in it.

Basic Application Level Confidentiality Profile with the options Clean Pixel Data, Retain Longitudinal Temporal
Information with Modified Dates, Retain Device Identity and Clean Descriptors (`profile.py` holds the table). Where the
table is silent the value representation decides, towards less: see `unlisted.py`. After all of it, what is kept as
text is searched for the words of every name and the numbers of every identifier that the object carried.

What cannot be made safe is refused: a PeerError whose message is the reason. No message holds a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import copy
from datetime import date, timedelta
from io import BytesIO
from typing import Any

import pydicom
from msgspec import Struct
from pydicom._uid_dict import UID_dictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from edge.imaging.burned_in import Blacked, clean_pixels
from edge.imaging.descriptors import clean_text, known_word
from edge.imaging.pixel_element import own_pixels
from edge.imaging.profile import ALL_OPTIONS, EDITION, Action, Option, action_of, basic_action, row_of
from edge.imaging.pseudonym import date_shift_days, mapped_uid, patient_pseudonym
from edge.imaging.read import translated
from edge.imaging.unlisted import (
    PIXEL_TERMS,
    clean_unlisted,
    coded,
    left_over,
    standard_vr,
    unlisted_action,
    values,
    well_known,
)
from shared.errors import PeerError

DEPTH_LIMIT = 16  # of nested sequences
ELEMENT_LIMIT = 2_000_000  # in one object, all items counted
IMPLEMENTATION_UID = "2.25.326184215467394874613452637815163912418"
_METHOD = f"Radfleet, PS3.15 {EDITION} Annex E"  # LO: 64 characters at most

_PIXELS = {0x7FE00001, 0x7FE00002, 0x7FE00008, 0x7FE00009, 0x7FE00010}
_REFUSED = (
    ("1.2.840.10008.5.1.4.1.1.88.", "a structured report: its content is not cleaned"),
    ("1.2.840.10008.5.1.4.1.1.104.", "an encapsulated document: its pages are not cleaned"),
    ("1.2.840.10008.5.1.4.1.1.9.", "a waveform: its samples are not looked into"),
    ("1.2.840.10008.5.1.4.1.1.11.", "a presentation state: its annotations are not cleaned"),
    ("1.2.840.10008.5.1.4.1.1.66", "raw data, or points and grids that are not looked into"),
    ("1.2.840.10008.5.1.4.1.1.91.", "a list of points that is not looked into"),
)
_SPATIAL = {"1", "2", "4", "7", "8"}  # of 66.: registrations by matrix, fiducials, segmentations
_SYNTAXES = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}

_SHORT = {"LO", "SH", "ST", "LT", "UT", "UC", "UR", "AE", "CS", "PN"}
_DUMMY: dict[str, Any] = {
    **dict.fromkeys(("LO", "SH", "ST", "LT", "UT", "UC", "AE", "CS"), "REMOVED"),
    **dict.fromkeys(("IS", "DS"), "0"),
    **dict.fromkeys(("US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "AT"), 0),
    **dict.fromkeys(("OB", "OW", "OL", "OD", "OF", "OV", "UN"), b"\0" * 8),
    "PN": "REMOVED",
    "UR": "urn:removed",
    "AS": "000Y",
    "DA": "19000101",
    "DT": "19000101000000",
    "TM": "000000",
}
# Value types and relations of content items: the frame that a dummy content sequence keeps (PS3.3 C.17.3).
_FRAME = {0x0040A040, 0x0040A010, 0x0040A050}
_IDENTIFIERS = (0x00100020, 0x00101000, 0x00080050, 0x00380010, 0x00200010, 0x00402016, 0x00402017)
_CLOSED = (Action.REMOVE, Action.EMPTY)  # of a sequence: its items are not walked
_BIRTH_DATE = 0x00100030
_DATE_FORMS = (
    "{0}{1}{2}",
    "{0}-{1}-{2}",
    "{0}.{1}.{2}",
    "{0}/{1}/{2}",
    "{2}{1}{0}",
    "{2}.{1}.{0}",
    "{2}/{1}/{0}",
    "{1}/{2}/{0}",
)
_TIME = re.compile(r"\d{2}(:?\d{2}(:?\d{2}(\.\d{1,6})?)?)?")
_DATE = re.compile(r"(\d{4})\.?(\d{2})\.?(\d{2})")
_DATETIME = re.compile(r"(\d{4})(\d{2})?(\d{2})?(\d{0,6}(\.\d{1,6})?)([+-]\d{4})?")


class Deidentified(Struct, frozen=True):
    """A clean object and what was blacked in its pixels."""

    dataset: FileDataset
    blacked: tuple[Blacked, ...]


def deidentify(dataset: Dataset, site_key: bytes, options: frozenset[Option] = ALL_OPTIONS) -> Deidentified:
    """Returns a new object that follows the profile; the one given stays as it is.

    The same site key gives the same UIDs, the same patient name and the same shift of dates every time.

    Args:
        dataset: as `edge.imaging.read.open_object` returns it.
        site_key: 32 bytes that never leave the node.
        options: BASIC and any of the others; what is left out is done as the Basic Profile says.

    Raises:
        PeerError: it cannot be made safe or cannot be read; the message says why and names nobody.
    """
    with translated("cannot be de-identified"):
        syntax = _accept(dataset)
        work = _Work(dataset, site_key, options)
        clean = work.item(dataset, 0)
        work.sweep(clean)
        _sign(clean, work, options)
        out = FileDataset("", clean, preamble=b"\0" * 128, file_meta=_meta(clean, syntax))
        headers = own_pixels(out)
        blacked: tuple[Blacked, ...] = ()
        if Option.CLEAN_PIXELS in options:
            blacked = clean_pixels(out)
        work.search_pixels(out, headers)
    return Deidentified(out, blacked)


def encode(dataset: FileDataset) -> bytes:
    """Returns a de-identified object as a Part 10 file; PeerError when it cannot be written or read again."""
    with translated("cannot be written"):
        out = BytesIO()
        pydicom.dcmwrite(out, dataset, enforce_file_format=True)
        again = pydicom.dcmread(BytesIO(out.getvalue()))
        if again.SOPInstanceUID != dataset.SOPInstanceUID or len(again) != len(dataset):
            raise PeerError("The object written does not read back as it was.")
    return out.getvalue()


def _accept(dataset: Dataset) -> UID:
    """Returns the transfer syntax; PeerError for kinds of objects that the profile's table alone does not make safe."""
    sop_class = str(dataset.get("SOPClassUID", ""))
    for prefix, what in _REFUSED:
        rest = sop_class[len(prefix) :]
        if sop_class.startswith(prefix) and not (prefix.endswith(".66") and rest[1:] in _SPATIAL):
            raise PeerError(f"The object is {what}.")
    if not sop_class.startswith("1.2.840.10008.5.1.4.1.1."):
        raise PeerError("The object is of no SOP class that the standard defines.")
    planes = [dataset[group, 0x0100].value for group in range(0x6000, 0x6020, 2) if (group, 0x0100) in dataset]
    if any(bits != 1 for bits in planes):
        raise PeerError("The object has an overlay in unused bits of its pixels.")
    if {"LABEL", "OVERVIEW"} & {part.upper() for part in values(dataset.get("ImageType"))}:
        raise PeerError("The object is the picture of a slide's label or of the whole slide with it.")
    syntax = getattr(dataset, "file_meta", FileMetaDataset()).get("TransferSyntaxUID")
    if syntax is None:
        implicit, little = dataset.original_encoding
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        return ImplicitVRLittleEndian if implicit else explicit
    if syntax not in _SYNTAXES and not (syntax.is_transfer_syntax and syntax.is_encapsulated):
        raise PeerError("The object has a transfer syntax that is not known here.")
    return UID(syntax)


def _meta(dataset: Dataset, syntax: UID) -> FileMetaDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = syntax
    meta.ImplementationClassUID = UID(IMPLEMENTATION_UID)
    return meta


def _sign(dataset: Dataset, work: _Work, options: frozenset[Option]) -> None:
    """Sets who the object is now about, and what was done to it (PS3.15 E.1.1, PS3.3 C.7.1.1, C.12.1)."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName = dataset.PatientID = work.pseudonym
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = _METHOD
    dataset.DeidentificationMethodCodeSequence = [_code(option) for option in Option if option in options]
    dates = "MODIFIED" if Option.MODIFIED_DATES in options else "REMOVED"
    dataset.LongitudinalTemporalInformationModified = dates
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
        if not dataset.get(name):
            raise PeerError(f"The object has no {name}.")


def _code(option: Option) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodeMeaning = option.value
    item.CodingSchemeDesignator = "DCM"
    return item


class _Work:
    """One object on its way: whose it is, by which options, and what must not stand in the result."""

    def __init__(self, dataset: Dataset, site_key: bytes, options: frozenset[Option]) -> None:
        patient = str(dataset.get("PatientID") or "").strip() or str(dataset.get("StudyInstanceUID") or "")
        self.pseudonym = patient_pseudonym(site_key, patient)
        self._site_key = site_key
        self._options = options
        self._shift = timedelta(days=date_shift_days(site_key, patient))
        self._elements = 0
        self._words: set[str] = set()  # of names, as they were written
        self._numbers: set[str] = set()  # identifiers, as they were written

    def item(self, source: Dataset, depth: int, *, dummy: bool = False, clean: bool = False) -> Dataset:
        """Returns what is kept of a data set or an item; `dummy` and `clean` are inherited from the sequence."""
        if depth > DEPTH_LIMIT:
            raise PeerError(f"Its sequences are nested deeper than {DEPTH_LIMIT}.")
        result = Dataset()
        codes = frozenset() if dummy else coded(source)
        for tag in sorted(source.keys()):
            self._elements += 1
            if self._elements > ELEMENT_LIMIT:
                raise PeerError(f"It has more than {ELEMENT_LIMIT} elements.")
            element = self._element(source, tag, depth, codes, dummy=dummy, clean=clean)
            if element is not None:
                result[tag] = element
        return result

    def _element(
        self, source: Dataset, tag: BaseTag, depth: int, codes: frozenset[int], *, dummy: bool, clean: bool
    ) -> DataElement | None:
        if tag in _PIXELS:
            return copy(source[tag]) if depth == 0 else None  # the one given stays when pixels are changed
        if tag.group < 0x0008 or tag.element == 0 or tag == 0x00080005:
            return None
        try:
            element = source[tag]
            self._note(element)
            if not standard_vr(element):
                return None
            if tag in codes:
                return element
            return self._changed(element, depth, dummy=dummy, clean=clean)
        except PeerError:
            raise
        except Exception:  # noqa: BLE001 pydicom names no family; what cannot be read is not kept
            return None

    def _changed(self, element: DataElement, depth: int, *, dummy: bool, clean: bool) -> DataElement | None:
        row = row_of(element.tag)
        action = unlisted_action(element) if row is None else action_of(row, element.VR, self._options)
        if dummy and action in (Action.KEEP, Action.CLEAN, Action.SHIFT) and element.tag not in _FRAME:
            action = Action.KEEP if well_known(element) else Action.DUMMY
        elif clean and action is Action.KEEP and element.VR in _SHORT:
            action = Action.CLEAN
        if row is None and action is Action.CLEAN and element.is_empty:
            return element  # as Type 2 allows
        kept = self._apply(action, element, depth, dummy=dummy, clean=clean)
        if action is Action.CLEAN and (kept is None or not kept.value):
            left = basic_action(row) if row else left_over(element.tag)
            kept = self._apply(left, element, depth, dummy=True, clean=False)
        return kept

    def _apply(
        self, action: Action, element: DataElement, depth: int, *, dummy: bool, clean: bool
    ) -> DataElement | None:
        vr, value = element.VR, element.value
        if action is Action.REMOVE:
            return None
        if vr == "SQ":
            if action is Action.EMPTY:
                return DataElement(element.tag, vr, Sequence())
            dummy, clean = dummy or action is Action.DUMMY, clean or action is Action.CLEAN
            if clean and not dummy:
                return DataElement(element.tag, vr, Sequence(self._cleaned_items(value, depth)))
            return DataElement(element.tag, vr, Sequence([self.item(one, depth + 1, dummy=dummy) for one in value]))
        change: dict[Action, Callable[[], Any]] = {
            Action.EMPTY: lambda: None if vr in ("US", "SS", "UL", "SL", "FL", "FD", "AT", "UV", "SV") else "",
            Action.DUMMY: lambda: self._dummy(vr, value),
            Action.MAP_UID: lambda: [self._uid(one) for one in values(value)],
            Action.SHIFT: lambda: [self._moved(vr, one) for one in values(value)],
            Action.CLEAN: lambda: self._cleaned(element, strict=clean),
            Action.KEEP: lambda: value,
        }
        new = change[action]()
        if action is Action.EMPTY and vr in ("OB", "OW", "OL", "OD", "OF", "OV"):
            new = b""
        if isinstance(new, list):
            new = (new or [""])[0] if len(new) < 2 else new
        return DataElement(element.tag, vr, new)

    def _cleaned(self, element: DataElement, *, strict: bool) -> list[str]:
        tag, vr = element.tag, element.VR
        free = strict or row_of(tag) is not None
        cleaned = [clean_text(one) if free else clean_unlisted(tag, vr, one) for one in values(element.value)]
        return cleaned if any(cleaned) else []

    def _cleaned_items(self, items: Sequence, depth: int) -> list[Dataset]:
        """Codes of public schemes as they are, the cleaned texts of what is no code, nothing that says nothing."""
        kept = []
        for item in items:
            code = bool(item.get("CodingSchemeDesignator"))
            cleaned = self.item(item, depth + 1, clean=not code)
            if len(cleaned) and (not code or coded(item)):
                kept.append(cleaned)
        return kept

    def _dummy(self, vr: str, value: Any) -> Any:
        return [self._uid(one) for one in values(value)] if vr == "UI" else _DUMMY.get(vr, "")

    def _uid(self, uid: str) -> str:
        uid = uid.strip(" \0")
        return uid if not uid or uid in UID_dictionary else mapped_uid(self._site_key, uid)

    def _moved(self, vr: str, text: str) -> str:
        """A date or time after the patient's shift; empty when it cannot be read as one."""
        text = text.strip(" \0")
        if vr == "TM":
            return text if _TIME.fullmatch(text) else ""
        parts = (_DATE if vr == "DA" else _DATETIME).fullmatch(text)
        if parts is None:
            return ""
        year, month, day = (int(part or 1) for part in parts.groups()[:3])
        try:
            moved = date(year, month, day) + self._shift
        except (ValueError, OverflowError):
            return ""
        whole = f"{moved:%Y%m%d}".rjust(8, "0")
        if vr == "DA":
            return whole
        # No offset from UTC: it says where the hospital is. What was not there, day or month, is not added.
        return whole[:4] if not parts[2] else whole[:6] if not parts[3] else whole + parts[4]

    def _note(self, element: DataElement) -> None:
        if element.VR == "PN":
            for name in values(element.value):
                self._words.update(word for word in re.split(r"[\W_]+", name) if _telling(word, 3))
        elif element.tag in _IDENTIFIERS:
            self._numbers.update(one.strip() for one in values(element.value) if _telling(one.strip(), 4))
        elif element.VR == "SQ" and (row := row_of(element.tag)) and action_of(row, "SQ", self._options) in _CLOSED:
            self._note_inside(element.value, 1)
        elif element.tag == _BIRTH_DATE:
            for parts in filter(None, map(_DATE.fullmatch, values(element.value))):
                self._numbers.update(form.format(*parts.groups()) for form in _DATE_FORMS)

    def _note_inside(self, items: Sequence, depth: int) -> None:
        """Notes who is named in a sequence that goes, for what stays elsewhere."""
        for item in items if depth <= DEPTH_LIMIT else ():
            for tag in sorted(item.keys()):
                try:
                    element = item[tag]
                except Exception:  # noqa: BLE001, S112 pydicom names no family; what cannot be read names nobody
                    continue
                if element.VR == "SQ":
                    self._note_inside(element.value, depth + 1)
                else:
                    self._note(element)

    def sweep(self, dataset: Dataset) -> None:
        """Puts a dummy where a word of a name or an identifier still stands in a text; how to read pixels stays."""
        if not (self._words or self._numbers):
            return
        words = {word.casefold() for word in self._words}
        parts = {one.casefold() for one in self._numbers} | {
            word for word in words if len(word) >= 5 or not word.isascii()
        }
        for element in dataset:
            if element.VR == "SQ":
                for item in element.value:
                    self.sweep(item)
            elif element.VR in ("IS", "DS"):  # a measure may hold the digits of a short identifier by chance
                if any(len(one) >= 6 and one in self._numbers for one in values(element.value)):
                    element.value = _DUMMY[element.VR]
            elif element.VR in _SHORT and element.value not in PIXEL_TERMS.get(element.tag, ()):
                for text in map(str.casefold, values(element.value)):
                    if words & set(re.split(r"[\W_]+", text)) or any(part in text for part in parts):
                        element.value = _DUMMY[element.VR]
                        break

    def search_pixels(self, dataset: FileDataset, headers: bytes) -> None:
        """Raises PeerError when a name or identifier stands in compressed pixels, whatever its case.

        Three letters are enough in the `headers` of codestreams; among pixels they would come by chance.
        """
        if not dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            return
        where = ((headers.lower(), 3), (bytes(dataset.get("PixelData") or b"").lower(), 5))
        for one in {word.casefold() for word in self._words | self._numbers}:
            forms = {one.encode(errors="replace"), one.encode("latin-1", errors="ignore")}
            if any(len(form) >= least and form in data for data, least in where for form in forms):
                raise PeerError("An identifier stands inside of the compressed pixels.")


def _telling(word: str, least: int) -> bool:
    return (len(word) >= least or (len(word) >= 2 and not word.isascii())) and not known_word(word)
