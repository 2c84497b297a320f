"""What the manifests expect of a file, as the outcomes that answer to it; and where we differ, why.

The hostile corpus's notes are written for people ("a hint, not a standard"). A note that asks for an outcome is read
strictly; one that only names what other products do with the file (a CVE, a crash) allows every orderly outcome.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pydicom

from edge.intake.status import Outcome
from scripts.lab.corpora import BESIDE, CONFLICT, FETCHED, NO_UID, Fate, Item

# What became of a file, in a word: of the stored ones by what the pipeline made of them.
KEPT = "kept"  # fetched back identical (or kept beside another of its UIDs); no model was asked about it
ANSWERED = "answered"  # the same, and a model read it
UNREAD = "unread"  # kept, and quarantined by imaging with a reason
NO_ADDRESS = "NO ADDRESS"  # kept, neither quarantined nor to be had by DICOMweb: never right
CUT, BAD_UID, MISMATCH = Outcome.CUT.value, Outcome.BAD_UID.value, Outcome.MISMATCH.value
NOT_DICOM, NO_CLASS = Outcome.NOT_DICOM.value, Outcome.CLASS_UNKNOWN.value
NO_SYNTAX = Outcome.SYNTAX_UNKNOWN.value
REFUSED = frozenset({CUT, BAD_UID, MISMATCH, NOT_DICOM, NO_CLASS, NO_SYNTAX})
UNUSED = frozenset({KEPT, UNREAD}) | REFUSED

# Pattern in the manifest's note, what the notes of this row say, and the outcomes that answer to them. The first row
# whose pattern is found holds.
EXPECTED: tuple[tuple[str, str, frozenset[str]], ...] = (
    (r"^$", "none: a real object", frozenset({KEPT, ANSWERED})),
    # refusal, by the reason that is right
    (r"^reject (fast|quickly), no \d GB", "reject fast, no allocation", frozenset({CUT})),
    (r"^reject or store partial", "truncated: reject or store partial", frozenset({CUT, NOT_DICOM})),
    (r"^Truncated stream|^Parser hang|truncated dataset$", "cut or endless: stream error", frozenset({CUT, NOT_DICOM})),
    (r"wrong parse start$|wrong DICM offset$", "DICM at a wrong place: reject", frozenset({NOT_DICOM})),
    (r"TS lookup$", "unknown transfer syntax: reject", frozenset({NO_SYNTAX})),
    (r"^Reject invalid UID", "reject invalid UID", frozenset({BAD_UID, MISMATCH, NOT_DICOM, UNREAD})),
    (r"nothing outside the store", "reject; nothing outside the store", frozenset({BAD_UID, MISMATCH, UNREAD})),
    # as one likes
    (
        r"(?i)^(accept.*|guess|store first) or reject|^reject or (flag|recover|tre|tru)|store opaque$",
        "accept or reject, guess, recover, flag",
        UNUSED,
    ),
    (r"^no crash", "no crash, no hang", UNUSED),
    # to be kept
    (
        r"(?i)^accept|^store as text|accept or warn$|^decode$|^Display confusion",
        "accept, with or without a warning; store as text; decode",
        frozenset({KEPT, ANSWERED}),
    ),
    (
        r"^no (path use|log|division|NaN)|^escaped in|^flag$|^bounded inflate|^CHECK for command",
        "no path use, no injection, no division by zero, bounded inflate",
        frozenset({KEPT}),
    ),
    (r"^CHECK if PACS silently", "no silent overwriting", frozenset({KEPT, BAD_UID})),
    (r"^store; decode", "store; decode must fail cleanly", frozenset({KEPT, UNREAD})),
    # no model may read the pixels
    (r"reject for inference|^reject, no", "reject for inference; no huge allocation", frozenset({KEPT, UNREAD, CUT})),
    (r"decode.* fails? cleanly", "decode fails cleanly", frozenset({KEPT, UNREAD, CUT})),
    # refusal of any kind
    (r"(?i)^reject", "reject", REFUSED | {UNREAD}),
    (
        r"CVE-\d|(?i:crash|overflow|OOM|over-read|exploitation|injection|garbled|termination|over/underrun)",
        "a CVE, a crash, a hang: what goes wrong elsewhere",
        UNUSED,
    ),
)

_TEXT = "an odd value is kept as it came: the door refuses what it cannot file under the right name, and judges no text"
_PIXELS = "a lie about pixels is none about bytes: kept as it came; no head takes the object, so nothing decodes it"
_META = "the fault is in the file meta information, which no C-STORE carries: what came was right"
_CUT = "the data set ends before its own lengths say so"
# Where an outcome is not the expected one, by file name, and why it stays so.
DEPARTURES: tuple[tuple[str, str, str], ...] = (
    (r"^TC0(009|019|021|045|063|073|077|079|173|181|185)_.*_over_", KEPT, _TEXT),
    (r"^TC0(199|207|211)_age_|^TC0215_date_|^TC02(37|39|41|49|51)_.*_as_|^TC025[79]_implicit_", KEPT, _TEXT),
    (r"^TC033[135]_pi_|^dev_(frames_neg|bits_alloc_0|bits_alloc_64|bits_stored_gt|spp_300)\.", KEPT, _PIXELS),
    (r"^TC0401_invalid_ts|^pynetdicom_CTImageStorage_bad_meta|^fo-dicom_GH177_", KEPT, _META),
    (r"^dev_nest_2000?\.", KEPT, "nesting is walked without recursion, so its depth is no reason to lose an object"),
    (
        r"^dev_sopclass_missing\.",
        KEPT,
        "by HTTP: the file meta information names the class, and nothing contradicts it",
    ),
    (r"^TC0153_studyinstanceuid_len1\.", UNREAD, "a UID has two components at least (PS3.5 9.1)"),
    (r"^pydicom_MR_truncated\.", CUT, _CUT),
    (
        r"^(MR_truncated|rtplan_truncated|emri_small_jpeg_2k_lossless_too_short|GH179[AB]|GH626)\.dcm$|^3gb-bulk-data",
        CUT,
        _CUT,
    ),
    (r"^badVR\.dcm$", UNREAD, "the number of a numeric element cannot be read"),
    (r"^genFile\.dcm$", NO_CLASS, "by HTTP: its SOP class is no storage class"),
)


def row_of(item: Item) -> str:
    """Returns the pattern of the row of EXPECTED that holds for a file.

    Raises:
        LookupError: no row says what its expectation means.
    """
    for pattern, _, _ in EXPECTED:
        if re.search(pattern, item.expected):
            return pattern
    raise LookupError(item.expected)


def allowed(item: Item) -> frozenset[str]:
    """Returns the outcomes that answer to what is expected of a file; LookupError as `row_of`."""
    found = row_of(item)
    return next(outcomes for pattern, _, outcomes in EXPECTED if pattern == found)


def became(fate: Fate, work: Mapping[str, str]) -> str:
    """Returns a file's outcome in a word; `work` is what the pipeline made of each object, by its digest."""
    done = work.get(fate.digest, "")
    if fate.outcome == CONFLICT:
        return KEPT
    if fate.outcome not in {FETCHED, BESIDE, NO_UID}:
        return fate.outcome
    if done == "quarantined":
        return UNREAD
    if fate.outcome == NO_UID:
        return NO_ADDRESS
    return ANSWERED if done in {"answered", "slice"} else KEPT


def departure(item: Item, outcome: str) -> str | None:
    """Returns why an outcome that is not the expected one is right, None where nothing says so."""
    why = next((why for name, one, why in DEPARTURES if one == outcome and re.search(name, item.path.name)), None)
    return why or _by_its_header(item.path, outcome)


def _by_its_header(path: Path, outcome: str) -> str | None:
    """The reasons that a file's own header gives, whatever was expected of its body."""
    try:
        dataset = pydicom.dcmread(path, defer_size=4096, force=True)
        meta = dataset.file_meta
        names = ("SOPClassUID", "SOPInstanceUID")
        pairs = [(str(meta.get(f"MediaStorage{name}", "")), str(dataset.get(name, ""))) for name in names]
    except Exception:  # noqa: BLE001 damaged on purpose
        return None
    if outcome == MISMATCH and any(meta_says != data_says for meta_says, data_says in pairs):
        return "by HTTP: the file meta information names another object than the data set"
    if outcome == NOT_DICOM and not (all(said for said, _ in pairs) and meta.get("TransferSyntaxUID")):
        return "by HTTP: no file meta information (PS3.10 7.1) that names class, instance and transfer syntax"
    if outcome == UNREAD and not (dataset.get("StudyInstanceUID") and dataset.get("SeriesInstanceUID")):
        return "the object names no study or no series"
    if outcome == UNREAD and "PixelData" not in dataset:
        return "an object of an image class without pixel data"
    return None
