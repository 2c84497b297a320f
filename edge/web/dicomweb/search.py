"""QIDO-RS answers: the index for what is there, headers for what it is called.

A header is read once and kept, encoded, in a bounded memory: the first question about a large study walks its
files, the next ones do not.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator

import msgspec
from msgspec import Struct

from edge.web.dicomweb.elements import Header, Json, encode_json, identity, opened, to_json
from edge.web.dicomweb.query import (
    HEAD_TAGS,
    SERIES_TAGS,
    STUDY_TAGS,
    Query,
    counted,
)
from edge.web.dicomweb.retention import Kept, Retention, SeriesCount, Uids
from shared.errors import PeerError, StateError

KEPT_HEADERS = 20_000  # about 1.5 KB each
_BEGINNING_BYTES = 32 * 1024  # of a data set; enough for nearly every header
_TOGETHER = 200  # rows asked of the index at once


class Found(Struct, frozen=True):
    """An answer: DICOM JSON objects, and whether there are more than were asked for."""

    results: list[Json]
    more: bool


class Headers:
    """The elements of HEAD_TAGS of objects, by digest."""

    def __init__(self, retention: Retention) -> None:
        self._retention = retention
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, kept: Kept) -> Json:
        """Returns an object's header; of one that cannot be read what the index knows."""
        with self._lock:
            encoded = self._kept.get(kept.digest)
            if encoded is not None:
                self._kept.move_to_end(kept.digest)
        if encoded is None:
            encoded = encode_json(self.read(kept, list(HEAD_TAGS)) | identity(kept))
            with self._lock:
                self._kept[kept.digest] = encoded
                if len(self._kept) > KEPT_HEADERS:
                    self._kept.popitem(last=False)
        found: Json = msgspec.json.decode(encoded)
        return found

    def read(self, kept: Kept, tags: list[int]) -> Json:
        """Returns some elements, read from the file; none when it cannot be read."""
        try:
            with opened(self._retention.path(kept), kept, _BEGINNING_BYTES) as file:
                header = Header(file, kept.transfer_syntax, tags)
                if header.pixels_at < _BEGINNING_BYTES:
                    return to_json(header, lambda _path: "", tags)
            with opened(self._retention.path(kept), kept) as file:
                return to_json(Header(file, kept.transfer_syntax, tags), lambda _path: "", tags)
        except (PeerError, StateError):
            return {}


def search(retention: Retention, headers: Headers, query: Query, within: Uids, base: str) -> Found:
    """Returns what a question finds.

    `within` are the UIDs of the request's path; `base` is the address that retrieve URLs start with.
    """
    uids = _narrowed(within, query)
    if uids is None:
        return Found([], more=False)
    answers = {"studies": _studies, "series": _series, "instances": _instances}[query.level]
    results: list[Json] = []
    for position, result in enumerate(answers(retention, headers, query, uids, base), _skipped(query)):
        if position >= query.offset + query.limit:
            return Found(results, more=True)
        if position >= query.offset:
            results.append(result)
    return Found(results, more=False)


def _skipped(query: Query) -> int:
    """How many results the index passes by itself: all of the offset, where it alone tells what matches."""
    return query.offset if query.level == "instances" and not query.keys and not query.modalities else 0


def _narrowed(within: Uids, query: Query) -> Uids | None:
    """Joins the path's UIDs with those of the parameters; None when they contradict each other."""
    found: dict[str, tuple[str, ...]] = {}
    for name in ("study", "series", "instance"):
        path, asked = getattr(within, name), query.uids.get(name, ())
        found[name] = tuple(uid for uid in asked if not path or uid in path) or (() if asked else path)
        if asked and not found[name]:
            return None
    return Uids(**found)


def _studies(retention: Retention, headers: Headers, query: Query, uids: Uids, base: str) -> Iterator[Json]:
    studies = _by_study(retention.series(uids))
    if uids.series or uids.instance:  # those chose the studies; what is counted is the whole study
        studies = _by_study(retention.series(Uids(tuple(studies)))) if studies else {}
    for study, kept in _with_objects(retention, studies.values()):
        head = headers.of(kept)
        if query.matches(head) and _modality_fits(query, study):
            counts = _study_counts(study) | {
                "00080056": {"vr": "CS", "Value": ["ONLINE"]},
                "00081190": {"vr": "UR", "Value": [f"{base}/studies/{kept.study}"]},
            }
            yield _result(head, counts, headers, kept, query, query.tags())


def _series(retention: Retention, headers: Headers, query: Query, uids: Uids, base: str) -> Iterator[Json]:
    every = retention.series(uids)
    relational = len(uids.study) != 1
    studies = _by_study(retention.series(Uids(uids.study)) if relational or query.modalities else every)
    for (one,), kept in _with_objects(retention, ([one] for one in every)):
        head = headers.of(kept)
        if query.matches(head) and _modality_fits(query, studies.get(kept.study, [one])):
            counts: Json = {
                "00201209": {"vr": "IS", "Value": [one.instances]},
                "00081190": {"vr": "UR", "Value": [f"{base}/studies/{kept.study}/series/{kept.series}"]},
            }
            if relational:
                counts |= _study_counts(studies.get(kept.study, [one]))
            tags = query.tags("studies") if relational else query.tags() | {0x0020000D}
            yield _result(head, counts, headers, kept, query, tags)


def _instances(retention: Retention, headers: Headers, query: Query, uids: Uids, base: str) -> Iterator[Json]:
    studies = _by_study(retention.series(Uids(uids.study))) if query.modalities else {}
    above = {0x0020000D, 0x0020000E}
    if len(uids.series) != 1:
        above |= {*SERIES_TAGS, *(STUDY_TAGS if len(uids.study) != 1 else ())}
    for kept in retention.each(uids, skip=_skipped(query)):
        if query.modalities and not _modality_fits(query, studies.get(kept.study, [])):
            continue
        head = headers.of(kept)
        if query.matches(head):
            path = f"{base}/studies/{kept.study}/series/{kept.series}/instances/{kept.sop_instance}"
            counts = {
                "00080056": {"vr": "CS", "Value": ["ONLINE"]},
                "00081190": {"vr": "UR", "Value": [path]},
                "00083002": {"vr": "UI", "Value": [kept.transfer_syntax]},
            }
            yield _result(head, counts, headers, kept, query, query.tags() | above)


def _result(head: Json, counts: Json, headers: Headers, kept: Kept, query: Query, tags: set[int]) -> Json:
    extra = {tag for tag in query.include if tag not in HEAD_TAGS and not counted(tag)}
    found = head | (headers.read(kept, sorted(extra)) if extra else {})
    chosen = {name: value for name, value in found.items() if int(name, 16) in tags or name == "00080005"}
    return dict(sorted((chosen | counts).items()))


def _with_objects(
    retention: Retention, groups: Iterable[list[SeriesCount]]
) -> Iterator[tuple[list[SeriesCount], Kept]]:
    """Gives each group with the newest of its objects; groups that were evicted meanwhile are left out."""
    waiting = list(groups)
    for start in range(0, len(waiting), _TOGETHER):
        some = waiting[start : start + _TOGETHER]
        newest = [max(one.newest for one in group) for group in some]
        objects = retention.by_id(newest)
        yield from ((group, objects[at]) for group, at in zip(some, newest, strict=True) if at in objects)


def _by_study(series: list[SeriesCount]) -> dict[str, list[SeriesCount]]:
    found: defaultdict[str, list[SeriesCount]] = defaultdict(list)
    for one in series:
        found[one.study].append(one)
    return found


def _modality_fits(query: Query, study: list[SeriesCount]) -> bool:
    return not query.modalities or any(one.modality in query.modalities for one in study)


def _study_counts(study: list[SeriesCount]) -> Json:
    return {
        "00080061": {"vr": "CS", "Value": sorted({one.modality for one in study if one.modality})},
        "00201206": {"vr": "IS", "Value": [len(study)]},
        "00201208": {"vr": "IS", "Value": [sum(one.instances for one in study)]},
    }
