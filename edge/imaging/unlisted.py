"""What happens to attributes that Table E.1-1 does not name: the value representation decides, towards less.

A text stays when its words are of the closed vocabulary, a code string when it looks like a defined term, a technical
string when it is one of the few that images need and holds no long number. Bytes stay only where a picture or spectrum
cannot be computed without them.
"""

from __future__ import annotations

import re
from typing import Any

import pydicom
from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.tag import BaseTag

from edge.imaging.descriptors import clean_text
from edge.imaging.profile import Action

_BINARY = {"OB", "OW", "OF", "OD", "OL", "OV", "UN"}
# Palettes, LUT Data, Spectroscopy Data: each is numbers that a display or a model computes with.
_NEEDED_BYTES = {
    *range(0x00281200, 0x00281205),
    *range(0x00281211, 0x00281214),
    *range(0x00281221, 0x00281225),
    0x00283006,
    0x56000020,
}
# Of devices and of how an image was made; nobody is named in them by the standard's definition.
_TECHNICAL = {
    0x00080070,  # Manufacturer
    0x00081090,  # Manufacturer's Model Name
    0x00180024,  # Sequence Name
    0x00180085,  # Imaged Nucleus
    0x00181020,  # Software Versions
    0x00181210,  # Convolution Kernel
    0x00189005,  # Pulse Sequence Name
    0x00281054,  # Rescale Type
}
_LABELS = {0x00209056, 0x00480106, 0x006A000E}  # Stack ID, Optical Path Identifier and references to it
# Type 1 and 2 in a module of some image: what nothing is left of becomes a dummy, so that the object stays valid.
_REQUIRED = _LABELS | {
    0x00080008,  # Image Type
    0x00080060,  # Modality
    0x00080070,  # Manufacturer
    0x00080100,  # Code Value
    0x00080102,  # Coding Scheme Designator
    0x00080104,  # Code Meaning
    0x00081090,  # Manufacturer's Model Name
    0x00181020,  # Software Versions
    0x00201040,  # Position Reference Indicator
    0x00280004,  # Photometric Interpretation
    0x00281054,  # Rescale Type
    0x00409210,  # LUT Label
    0x00620005,  # Segment Label
    0x00620009,  # Segment Algorithm Name
    0x00660031,  # Algorithm Version
    0x00660036,  # Algorithm Name
    0x00700080,  # Content Label
}
# Public coding schemes (PS3.16 Table 8-1) and the form of their codes.
PUBLIC_CODES = {
    **dict.fromkeys(("SCT",), re.compile(r"\d{6,18}")),
    **dict.fromkeys(("SRT", "SNM3"), re.compile(r"[A-Z]\d?-[0-9A-F]{3,6}")),
    "DCM": re.compile(r"\d{6}|[A-Z0-9]{1,8}"),
    "LN": re.compile(r"\d{1,5}-\d"),
    "UCUM": re.compile(r"(\{[a-z ]{1,14}\}|[A-Za-z0-9.\[\]_%'*^+-]{1,12})(/[A-Za-z0-9.\[\]{}_%-]{1,8})*"),
    "RADLEX": re.compile(r"RID\d{1,6}"),
    "FMA": re.compile(r"\d{1,6}"),
    **dict.fromkeys(("I9C", "I10", "I11", "BI"), re.compile(r"[A-Z0-9]{1,5}(\.[A-Z0-9]{1,4})?")),
}
# What a reader of pixels goes by, so that it stays even when a patient is called so (PS3.3 C.7.6.3.1.2, C.7.3.1.1.1).
PIXEL_TERMS: dict[int, frozenset[str]] = {
    0x00280004: frozenset(
        {"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR", "RGB", "XYB"}
        | {"YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420", "YBR_PARTIAL_422"}
    ),
    0x00080060: frozenset({"SEG", "OPT", "REG", "DMS", "BMD", "ECG", "XA", "RF", "CT", "MR", "DX", "CR", "US", "IVUS"}),
}
_CODE_VALUE, _CODE_SCHEME, _CODE_MEANING = 0x00080100, 0x00080102, 0x00080104

_TERM = re.compile(r"(?!.*\d{4})[A-Z0-9_ ]{0,16}")
_METHOD = re.compile(r"ISO_\d{5}(_\d{1,2})?")  # Lossy Image Compression Method
_CONTEXT = re.compile(r"\d{1,5}")  # Context Identifier
_TECHNICAL_FORM = re.compile(r"(?!.*\d{6})(?!.*\d{4}[-./]\d\d?[-./]\d\d?)(?!.*\d\d?[-./]\d\d?[-./]\d{4})[ -~]{1,64}")
_LABEL_FORM = re.compile(r"[A-Z0-9]{1,3}")
_MEANING_FORM = re.compile(r"(?!.*\d{4}).*")
_AGE = re.compile(r"\d{3}[DWMY]")
# No component of a UID that the standard assigned is a number or a date of somebody's.
_ASSIGNED = re.compile(r"1\.2\.840\.10008(\.\d{1,3}){1,9}")
_BY_VR = {
    **dict.fromkeys(("PN", "AE"), Action.DUMMY),
    **dict.fromkeys(("DA", "DT", "TM"), Action.SHIFT),
    **dict.fromkeys(("LO", "SH", "ST", "LT", "UT", "UC", "CS"), Action.CLEAN),
    **dict.fromkeys(("UN", "UR"), Action.REMOVE),
}


def unlisted_action(element: DataElement) -> Action:
    """Returns what happens to an attribute that the table does not name and whose VR is the standard's."""
    vr = element.VR
    if element.tag.group == 0x0400:  # digital signatures, encrypted content: not valid any more, or not readable
        return Action.REMOVE
    if vr == "AS":
        return Action.KEEP if all(_AGE.fullmatch(one) for one in values(element.value)) else Action.EMPTY
    if vr in _BY_VR:
        return _BY_VR[vr]
    if set(vr.split(" or ")) & _BINARY:
        return Action.KEEP if element.tag in _NEEDED_BYTES else Action.REMOVE
    return Action.KEEP if vr != "UI" or well_known(element) else Action.MAP_UID


def left_over(tag: BaseTag) -> Action:
    """Returns what happens to an attribute that the table does not name when cleaning leaves nothing of it."""
    return Action.DUMMY if tag in _REQUIRED else Action.REMOVE


def clean_unlisted(tag: BaseTag, vr: str, text: str) -> str:
    """Returns what stays of one value of a text; empty when nothing may."""
    text = text.strip(" \0")
    if vr == "CS":
        form = _METHOD if tag == 0x00282114 else _CONTEXT if tag == 0x0008010F else _TERM
        return text if form.fullmatch(text) or _TERM.fullmatch(text) else ""
    if tag in _TECHNICAL or tag in _LABELS:
        return text if (_LABEL_FORM if tag in _LABELS else _TECHNICAL_FORM).fullmatch(text) else ""
    return clean_text(text)


def coded(item: Dataset) -> frozenset[int]:
    """Returns the tags that stay as they are in an item: value, scheme and meaning of a code of a public scheme."""
    texts = [str(item.get(tag).value or "").strip() if tag in item else "" for tag in (_CODE_VALUE, _CODE_SCHEME)]
    form = PUBLIC_CODES.get(texts[1])
    if form is None or not form.fullmatch(texts[0]):
        return frozenset()
    meaning = str(item[_CODE_MEANING].value or "") if _CODE_MEANING in item else ""
    whole = {_CODE_MEANING} if _MEANING_FORM.fullmatch(meaning) else set()
    return frozenset({_CODE_VALUE, _CODE_SCHEME} | whole)


def standard_vr(element: DataElement) -> bool:
    """True when the dictionary knows the attribute and its VR is one that it may have."""
    try:
        return set(element.VR.split(" or ")) <= set(dictionary_VR(element.tag).split(" or "))
    except KeyError:
        return False


def well_known(element: DataElement) -> bool:
    """True for UIDs that the standard assigned, such as SOP classes."""
    return element.VR == "UI" and all(
        not one or one in UID_dictionary or _ASSIGNED.fullmatch(one) for one in values(element.value)
    )


def values(value: Any) -> list[str]:
    """Returns every value of an element as text."""
    if value is None:
        return []
    many = isinstance(value, (list, tuple, pydicom.multival.MultiValue))
    return [str(one) for one in value] if many else [str(value)]
