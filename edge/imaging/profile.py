"""PS3.15 Table E.1-1 as data, and what it asks for one attribute.

`profile_e1.csv` holds the whole table; its header names edition and source. A compound action is resolved to the one
that is valid whatever the attribute's Type is: X/Z empties, everything with a D puts a dummy, X/Z/U* keeps the sequence
and maps its UIDs.
"""

from __future__ import annotations

import csv
import importlib.resources
from enum import Enum
from functools import cache

from msgspec import Struct
from pydicom.tag import BaseTag

EDITION = "2026c"


class Option(Enum):
    """What is done, by code value and meaning of PS3.16 CID 7050."""

    BASIC = ("113100", "Basic Application Confidentiality Profile")
    CLEAN_PIXELS = ("113101", "Clean Pixel Data Option")
    CLEAN_DESCRIPTORS = ("113105", "Clean Descriptors Option")
    MODIFIED_DATES = ("113107", "Retain Longitudinal Temporal Information Modified Dates Option")
    DEVICE_IDENTITY = ("113109", "Retain Device Identity Option")


ALL_OPTIONS = frozenset(Option)


class Action(Enum):
    """What happens to one attribute."""

    REMOVE = "X"
    EMPTY = "Z"
    DUMMY = "D"
    MAP_UID = "U"
    KEEP = "K"  # of a sequence: keep it, its items follow the table
    SHIFT = "dates C"
    CLEAN = "descriptors C"  # what cleaning leaves nothing of follows the basic action


class Row(Struct, frozen=True):
    """One row: `tag` eight hexadecimal digits, x for any in a repeating group; actions as the table writes them."""

    tag: str
    name: str
    basic: str
    device: str
    dates: str
    descriptors: str


_BASIC = {
    "X": Action.REMOVE,
    "Z": Action.EMPTY,
    "D": Action.DUMMY,
    "U": Action.MAP_UID,
    "X/Z": Action.EMPTY,
    "X/D": Action.DUMMY,
    "Z/D": Action.DUMMY,
    "X/Z/D": Action.DUMMY,
    "X/Z/U*": Action.KEEP,
}
_TIMES = {"DA", "DT", "TM"}
_CLEANABLE = {"LO", "SH", "LT", "ST", "UT", "UC", "CS", "SQ"}
# Group 60xx goes as a whole: its other attributes describe the plane that the table removes.
_GROUPS = {0x5000: "50xxxxxx", 0x6000: "60xx3000"}


@cache
def table() -> dict[str, Row]:
    """Returns every row by its tag."""
    text = importlib.resources.files("edge.imaging").joinpath("profile_e1.csv").read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {values["tag"]: Row(**values) for values in csv.DictReader(lines)}


def row_of(tag: BaseTag) -> Row | None:
    """Returns the row that holds for a tag; None for what the table does not name."""
    if tag.is_private:
        return table()["ggggeeee"]
    group = _GROUPS.get(tag.group & 0xFF00)
    return table().get(group or f"{tag:08x}")


def basic_action(row: Row) -> Action:
    """Returns what the Basic Profile asks."""
    return _BASIC[row.basic]


def action_of(row: Row, vr: str, options: frozenset[Option]) -> Action:
    """Returns what the profile with `options` asks for an attribute of this VR.

    Dates are shifted even where Retain Device Identity would let them stand: what is cleaned by both options must not
    be kept by one.
    """
    if row.dates and Option.MODIFIED_DATES in options and vr in _TIMES:
        return Action.SHIFT
    if row.device == "K" and not row.dates and Option.DEVICE_IDENTITY in options:
        return Action.KEEP
    if row.descriptors and Option.CLEAN_DESCRIPTORS in options and vr in _CLEANABLE:
        return Action.CLEAN
    return basic_action(row)
