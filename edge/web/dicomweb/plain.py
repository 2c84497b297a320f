"""The common case of DICOM JSON, straight from the bytes: ASCII text and small numbers.

pydicom's own way is right for everything and several times slower; metadata of a series of a thousand images is made
of some hundred thousand such values. What is not plain here gives None and goes pydicom's way.
"""

from __future__ import annotations

import math
import struct
from typing import Any

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement

Json = dict[str, Any]

_SEVERAL = frozenset({"AE", "AS", "CS", "DA", "DT", "LO", "SH", "TM", "UI"})
_ONE = frozenset({"LT", "ST", "UT", "UR"})
_PACKED = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FL": "f", "FD": "d"}
_ESCAPE = b"\x1b"  # begins another character set (ISO 2022)
_PAD = " \0"


def plain(raw: RawDataElement) -> Json | None:
    """Returns an element in the DICOM JSON model, or None where it is not plain."""
    value = raw.value
    vr = raw.VR or _known(raw)
    if not vr or not isinstance(value, bytes):
        return None
    if not value:
        return {"vr": vr} if vr in _SEVERAL or vr in _ONE or vr in _PACKED or vr in {"DS", "IS", "PN"} else None
    if vr in _PACKED:
        return _packed(value, vr, "<" if raw.is_little_endian else ">")
    if not value.isascii() or _ESCAPE in value:
        return None
    text = value.decode("ascii")
    if vr in _SEVERAL:
        values: list[Any] = [part.strip(_PAD) or None for part in text.split("\\")]
    elif vr in _ONE:
        values = [text.rstrip(_PAD) or None]
    elif vr == "PN":
        values = [_name(part.rstrip(_PAD)) for part in text.split("\\")]
    elif vr in {"DS", "IS"}:
        try:
            values = [(float if vr == "DS" else int)(part) for part in text.rstrip(_PAD).split("\\")]
        except ValueError:
            return None
    else:
        return None
    if values == [None]:
        return {"vr": vr}
    return {"vr": vr, "Value": values}


def _known(raw: RawDataElement) -> str:
    try:
        return dictionary_VR(raw.tag)
    except KeyError:
        return ""


def _packed(value: bytes, vr: str, order: str) -> Json | None:
    code = _PACKED[vr]
    count, rest = divmod(len(value), struct.calcsize(code))
    if rest:
        return None
    values = struct.unpack(f"{order}{count}{code}", value)
    return {"vr": vr, "Value": list(values)} if all(map(math.isfinite, values)) else None


def _name(text: str) -> Json | None:
    kinds = ("Alphabetic", "Ideographic", "Phonetic")
    return {kind: part for kind, part in zip(kinds, text.split("="), strict=False) if part} or None
