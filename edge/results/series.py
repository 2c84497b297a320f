"""When a series is complete enough to answer, and why it was thought so.

Four kinds of evidence, the strongest first: as many objects as the images announce, the end of the associations that
brought them, quiet time, and a hard limit. A late object opens the series again and gives a new version.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct
from pydicom.dataset import Dataset

from edge.imaging.read import Stack, lenient_text

ANNOUNCED_LIMIT = 100_000  # objects of one series; larger counts are not believed
WHOLE = ""  # what is announced is the series, and not one of its acquisitions


class Rules(Struct, frozen=True):
    """Seconds after which a series is answered: without a new slice, and at the latest since its first one."""

    quiet_s: float
    hard_limit_s: float


class Announced(Struct, frozen=True):
    """How many objects a series is said to have; `firm` when that is said of the series itself."""

    count: int
    firm: bool


class Evidence(Struct, frozen=True):
    """What is known of a series; times are seconds since 1970."""

    pending_since: float  # when the first slice that no answer counts was stored
    last_stored_at: float
    unread: bool = False  # stored objects still wait to be read
    ended: bool = False  # the associations that brought it have ended, the last with more than one slice
    arrived: int = 0  # objects that were read or cannot be, each SOP instance once
    announced: Announced | None = None


def completeness(rules: Rules, now: float, known: Evidence) -> str:
    """Returns why the series may be answered now, or nothing while it may not.

    A firm count that is not reached holds the answer back until the hard limit; one of acquisitions only outweighs
    the end of an association, because a reconstruction may keep a part of them. More objects than announced: the
    announcement was wrong and counts for nothing.
    """
    announced, short = known.announced, False
    so_far = ""
    if announced and known.arrived < announced.count:
        short, so_far = True, f" with {known.arrived} of {announced.count}"
    if _passed(known.pending_since, now, rules.hard_limit_s):
        return f"hard limit{so_far}"
    if known.unread:
        return ""
    if announced and known.arrived == announced.count:
        return f"expected count {known.arrived} of {announced.count}"
    if known.ended and not short:
        return "association ended"
    if not (short and announced and announced.firm) and _passed(known.last_stored_at, now, rules.quiet_s):
        return f"quiet time{so_far}"
    return ""


def announcement(dataset: Dataset) -> tuple[str, int] | None:
    """Returns what an object says about its series: WHOLE or the name of its acquisition, and how many objects.

    NumberOfSeriesRelatedInstances (0020,1209) and the PET series' own numbers (PS3.3 C.8.9.1) count the series,
    ImagesInAcquisition (0020,1002) an acquisition. NumberOfSlices of an NM object counts inside the object: nothing.
    """
    count = _count(dataset, "NumberOfSeriesRelatedInstances")
    if count:
        return WHOLE, count
    if _count(dataset, "NumberOfFrames") > 1:
        return None
    if lenient_text(dataset, "Modality", 16).upper() == "PT":
        count = _count(dataset, "NumberOfSlices") * _volumes(dataset)
        if 0 < count <= ANNOUNCED_LIMIT:
            return WHOLE, count
    count = _count(dataset, "ImagesInAcquisition")
    if count > 1:  # some scanners write 1 into every image
        return f"acquisition {_count(dataset, 'AcquisitionNumber')}", count
    return None


def mixed(stacks: Iterable[Stack]) -> str:
    """Returns why slices cannot be read as one stack, or nothing; what a slice does not say divides nothing."""
    seen = set(stacks)
    planes = {one.plane for one in seen if one.plane}
    kernels = {one.kernel for one in seen if one.kernel}
    if len(planes) > 1:
        return f"the series mixes {len(planes)} orientations"
    return f"the series mixes {len(kernels)} reconstruction kernels" if len(kernels) > 1 else ""


def reopened(complete: str, late: int) -> str:
    """Returns the reason of a new version; `late` is how many objects came after the version before."""
    return f"{complete}, opened again by {late} late image{_plural(late)}" if late else complete


def without(complete: str, unreadable: int) -> str:
    """Returns the reason with how many objects of the series are in quarantine and not in the answer."""
    return f"{complete}, {unreadable} image{_plural(unreadable)} could not be read" if unreadable else complete


def _plural(number: int) -> str:
    return "" if number == 1 else "s"


def _volumes(dataset: Dataset) -> int:
    """How often a PET series has its slices: in time, or in the heart's cycle."""
    kind = lenient_text(dataset, "SeriesType", 16).upper()
    if kind == "DYNAMIC":
        return _count(dataset, "NumberOfTimeSlices")
    if kind == "GATED":
        return _count(dataset, "NumberOfRRIntervals") * _count(dataset, "NumberOfTimeSlots")
    return 1


def _count(dataset: Dataset, name: str) -> int:
    """0 where it is absent, no number, or out of bounds."""
    text = lenient_text(dataset, name, 12)
    number = int(text) if text.isascii() and text.isdigit() else 0
    return number if number <= ANNOUNCED_LIMIT else 0


def _passed(since: float, now: float, seconds: float) -> bool:
    """Also when the clock went back by more than `seconds`: a series must not wait for the time to return."""
    return now - since >= seconds or since - now > seconds
