"""The common case of DICOM JSON, straight from the bytes: ASCII text and small numbers.

pydicom's own way is right for everything and several times slower; metadata of a series of a thousand images is made
of some hundred thousand such values. What is not plain here gives None and goes pydicom's way.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement

Json = dict[str, Any]

_SEVERAL = frozenset({"AE", "AS", "CS", "DA", "DT", "LO", "SH", "TM", "UI"})
_ONE = frozenset({"LT", "ST", "UT", "UR"})
_PACKED = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_NUMBERS: dict[str, Callable[[str], float]] = {"DS": float, "IS": int}
_PLAIN = _SEVERAL | _ONE | _PACKED.keys() | _NUMBERS.keys() | {"PN"}
_ESCAPE = b"\x1b"  # begins another character set (ISO 2022)
_PAD = " \0"


def plain(raw: RawDataElement) -> Json | None:
    """Returns an element in the DICOM JSON model, or None where it is not plain."""
    value = raw.value
    vr = raw.VR or _known(raw)
    if vr not in _PLAIN or not isinstance(value, bytes):
        return None
    try:
        values = _values(value, vr, "<" if raw.is_little_endian else ">") if value else []
    except ValueError:
        return None
    return {"vr": vr} if values in ([], [None]) else {"vr": vr, "Value": values}


def _values(value: bytes, vr: str, order: str) -> list[Any]:
    """Raises ValueError where the value is not plain."""
    if vr in _PACKED:
        return _packed(value, _PACKED[vr], order)
    if not value.isascii() or _ESCAPE in value:
        raise ValueError(vr)
    text = value.decode("ascii")
    if vr in _ONE:
        return [text.rstrip(_PAD) or None]
    parts = [part.strip(_PAD) for part in text.split("\\")]
    if vr in _NUMBERS:
        return [_NUMBERS[vr](part) for part in parts]
    return [_name(part) if vr == "PN" else part or None for part in parts]


def _known(raw: RawDataElement) -> str:
    try:
        return dictionary_VR(raw.tag)
    except KeyError:
        return ""


def _packed(value: bytes, code: str, order: str) -> list[Any]:
    count, rest = divmod(len(value), struct.calcsize(code))
    values = list(struct.unpack(f"{order}{count}{code}", value)) if not rest else [math.nan]
    if not all(map(math.isfinite, values)):
        raise ValueError(code)
    return values


def _name(text: str) -> Json | None:
    kinds = ("Alphabetic", "Ideographic", "Phonetic")
    return {kind: part for kind, part in zip(kinds, text.split("="), strict=False) if part} or None
