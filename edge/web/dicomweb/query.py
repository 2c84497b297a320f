"""QIDO-RS questions (PS3.18 10.6): parsed, matched and answered over DICOM JSON. Nothing here reads a file.

Matching (PS3.18 8.3.4.1): UIDs as lists, dates and times as ranges, person names with wildcards and without case,
other texts with wildcards, numbers by value. `fuzzymatching` is answered with the standard's warning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from msgspec import Struct
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from edge.web.dicomweb.elements import Json
from shared.errors import PeerError

Level = Literal["studies", "series", "instances"]
LIMIT = 10_000  # results of one answer
_TEXT_LENGTH = 200  # of a matching key; UID lists may be longer
_UIDS = 1000
_OTHER_PARAMETERS = {"accept", "charset", "emptyvaluematching", "multiplevaluematching"}

STUDY_TAGS = (
    0x00080020, 0x00080030, 0x00080050, 0x00080090, 0x00080201, 0x00081030, 0x00100010, 0x00100020, 0x00100030,
    0x00100040, 0x0020000D, 0x00200010,
)  # fmt: skip
SERIES_TAGS = (
    0x00080021, 0x00080031, 0x00080060, 0x00080070, 0x0008103E, 0x00180015, 0x0020000E, 0x00200011, 0x00400244,
    0x00400245,
)  # fmt: skip
INSTANCE_TAGS = (
    0x00080008, 0x00080016, 0x00080018, 0x00080023, 0x00080033, 0x00200013, 0x00280008, 0x00280010, 0x00280011,
    0x00280100,
)  # fmt: skip
HEAD_TAGS = tuple(sorted({0x00080005, *STUDY_TAGS, *SERIES_TAGS, *INSTANCE_TAGS}))
_TAGS: dict[Level, tuple[int, ...]] = {"studies": STUDY_TAGS, "series": SERIES_TAGS, "instances": INSTANCE_TAGS}
# What the index knows better than any one object's header.
_UID_KEYS = {0x0020000D: "study", 0x0020000E: "series", 0x00080018: "instance"}
MODALITIES_IN_STUDY = 0x00080061
_COUNTED = {0x00201206, 0x00201208, 0x00201209, 0x00080056, 0x00081190}


class Query(Struct, frozen=True):
    """One question. `keys` are matched on the header; `uids` and `modalities` on the index."""

    level: Level
    keys: dict[int, str]
    uids: dict[str, tuple[str, ...]]  # by "study", "series", "instance"
    modalities: frozenset[str]
    include: frozenset[int]
    include_all: bool
    limit: int
    offset: int
    warnings: tuple[str, ...]

    def matches(self, json: Json) -> bool:
        """Tells whether a header fits every key."""
        return all(matches(json.get(f"{tag:08X}", {}), _vr(tag), wanted) for tag, wanted in self.keys.items())

    def tags(self, *above: Level) -> set[int]:
        """Returns the tags of the answer: the level's own, those of the levels `above`, and what was asked for."""
        found = {tag for level in (self.level, *above) for tag in _TAGS[level]}
        return found | self.include | (set(HEAD_TAGS) - {0x00080005} if self.include_all else set())


def parse(level: Level, parameters: Iterable[tuple[str, str]]) -> Query:
    """Returns the question that a request's parameters ask.

    Raises:
        PeerError: a parameter is no attribute, or its value has the wrong form.
    """
    keys: dict[int, str] = {}
    uids: dict[str, tuple[str, ...]] = {}
    modalities: frozenset[str] = frozenset()
    include: set[int] = set()
    warnings: list[str] = []
    numbers = {"limit": LIMIT, "offset": 0}
    include_all = False
    for name, value in parameters:
        if name in numbers:
            numbers[name] = _number(name, value)
        elif name == "fuzzymatching":
            if value.lower() == "true":
                warnings.append(
                    "The fuzzymatching parameter is not supported. Only literal matching has been performed."
                )
        elif name == "includefield":
            fields = [field.strip() for field in value.split(",") if field.strip()]
            include_all = include_all or "all" in fields
            include |= {tag for field in fields if field != "all" and (tag := _tag(field)) is not None}
        elif name not in _OTHER_PARAMETERS and value not in {"", "*"}:
            tag = _tag(name)
            if tag in _UID_KEYS:
                uids[_UID_KEYS[tag]] = _uid_list(value)
            elif tag == MODALITIES_IN_STUDY:
                modalities = frozenset(part for part in re.split(r"[,\\]", value[:_TEXT_LENGTH]) if part)
            elif tag in HEAD_TAGS:
                keys[tag] = value[:_TEXT_LENGTH]
            else:
                warnings.append(f"The matching key {name} is not supported and was ignored.")
    return Query(
        level,
        keys,
        uids,
        modalities,
        frozenset(include),
        include_all,
        min(numbers["limit"], LIMIT),
        numbers["offset"],
        tuple(warnings),
    )


def matches(element: Json, vr: str, wanted: str) -> bool:
    """Tells whether one element of a header fits one key."""
    values = [text for value in element.get("Value", ()) for text in _texts(value)]
    if vr in {"DA", "TM", "DT"}:
        return any(_in_range(value, wanted) for value in values)
    if vr in {"IS", "DS", "US", "UL", "SS", "SL"}:
        return any(_same_number(value, wanted) for value in values)
    pattern = wildcard(wanted, ignore_case=vr == "PN")
    return any(pattern.fullmatch(value.strip(" ^") if vr == "PN" else value) for value in values)


def wildcard(wanted: str, *, ignore_case: bool) -> re.Pattern[str]:
    """Returns the pattern of a key with `*` and `?`.

    Between two stars the leftmost fit is as good as any: atomic groups never give it back, so no key is slow.
    """
    first, *rest = (re.escape(part).replace(r"\?", ".") for part in re.split(r"\*+", wanted.rstrip(" ^")))
    middle = "".join(f"(?>.*?{part})" for part in rest[:-1])
    body = first + middle + (f".*{rest[-1]}" if rest else "")
    return re.compile(body, re.DOTALL | (re.IGNORECASE if ignore_case else 0))


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [str(part) for part in value.values() if part]
    return [] if value is None else [str(value)]


def _in_range(value: str, wanted: str) -> bool:
    low, dash, high = wanted.replace(":", "").partition("-")
    value = value.replace(":", "").strip()
    if not dash:
        return value.startswith(low)
    return (not low or value[: len(low)] >= low) and (not high or value[: len(high)] <= high)


def _same_number(value: str, wanted: str) -> bool:
    try:
        return float(value) == float(wanted)
    except ValueError:
        return False


def _number(name: str, value: str) -> int:
    if not value.isascii() or not value.isdigit() or len(value) > 9:
        raise PeerError(f"The parameter {name} is not a number.")
    return int(value)


def _uid_list(value: str) -> tuple[str, ...]:
    found = tuple(part.strip() for part in re.split(r"[,\\]", value) if part.strip())
    if len(found) > _UIDS:
        raise PeerError(f"A list may have {_UIDS} UIDs.")
    return found


def _tag(name: str) -> int | None:
    """Returns the tag of a keyword or of eight hexadecimal digits; None for a path into a sequence.

    Raises:
        PeerError: it is neither.
    """
    if re.fullmatch(r"[0-9A-Za-z]{1,64}(\.[0-9A-Za-z]{1,64}){1,16}", name):
        return None
    found = int(name, 16) if re.fullmatch("[0-9A-Fa-f]{8}", name) else tag_for_keyword(name)
    if found is None:
        raise PeerError(f"{name[:64]!r} is no attribute.", cure="Use a DICOM keyword or eight hexadecimal digits.")
    return int(found)


def _vr(tag: int) -> str:
    return dictionary_VR(tag) if keyword_for_tag(tag) else "UN"


def counted(tag: int) -> bool:
    """Tells whether an attribute of an answer is counted or named by this server instead of read from a header."""
    return tag in _COUNTED or tag == MODALITIES_IN_STUDY
