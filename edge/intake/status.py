"""Every answer to a C-STORE or a part of a STOW-RS request in one table: our reason, the standard's status."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """What became of one received object."""

    STORED = "stored"  # on disk, fsynced, indexed
    DUPLICATE = "duplicate"  # the same bytes were stored before: idempotent success
    CONFLICT = "conflict"  # stored beside other bytes of the same SOP Instance UID; flagged
    IDENTITY_CONFLICT = "identity_conflict"  # the same, of another patient or with other pixels: kept, not read
    NO_ROOM = "no_room"  # disk, quota or object limit
    MISMATCH = "mismatch"  # command and data set contradict each other about class or instance
    CUT = "cut"  # the data set ends before its own lengths say so
    BAD_UID = "bad_uid"  # the command's SOP Instance UID is not a UID
    FAULT = "fault"  # our disk or index failed, or a defect of ours
    NOT_DICOM = "not_dicom"  # by HTTP: no DICOM file, or its file meta information cannot be read
    CLASS_UNKNOWN = "class_unknown"  # by HTTP: what the DICOM door refuses in negotiation
    SYNTAX_UNKNOWN = "syntax_unknown"  # by HTTP: the same


STATUS: dict[Outcome, int] = {
    Outcome.STORED: 0x0000,
    Outcome.DUPLICATE: 0x0000,
    Outcome.CONFLICT: 0x0000,
    Outcome.IDENTITY_CONFLICT: 0x0000,
    Outcome.NO_ROOM: 0xA700,  # Refused: Out of Resources (PS3.4 table B.2-1)
    Outcome.MISMATCH: 0xA900,  # Error: Data Set does not match SOP Class
    Outcome.CUT: 0xC000,  # Error: Cannot understand
    Outcome.BAD_UID: 0x0117,  # Invalid SOP Instance (PS3.7 annex C.4.4)
    Outcome.FAULT: 0x0110,  # Processing Failure (PS3.7 annex C.4.2): the sender may try again
    Outcome.NOT_DICOM: 0xC000,  # these three: PS3.18 table I.2-2
    Outcome.CLASS_UNKNOWN: 0x0122,
    Outcome.SYNTAX_UNKNOWN: 0xC122,
}

KEPT = frozenset({Outcome.STORED, Outcome.DUPLICATE, Outcome.CONFLICT, Outcome.IDENTITY_CONFLICT})
BY_HTTP = frozenset({Outcome.NOT_DICOM, Outcome.CLASS_UNKNOWN, Outcome.SYNTAX_UNKNOWN})  # no C-STORE gets these
