"""Names that leave the record: keyed, so that nobody without the site's key can go back or compare
hospitals.
"""

from __future__ import annotations

import hashlib
import hmac
import uuid

HELD_OUT_ONE_IN = 3  # cases that a hospital keeps for judging, never for training
MIN_SHIFT_DAYS = 31
MAX_SHIFT_DAYS = 3650


def case_pseudonym(site_key: bytes, patient_id: str, uid: str) -> str:
    """Returns 32 hexadecimal digits for one case: HMAC-SHA256(site key, "PatientID|UID"), first 16 bytes.

    `uid` is the SOP Instance UID of a projection image, the Series Instance UID of a series.
    """
    return hmac.new(site_key, f"{patient_id}|{uid}".encode(), hashlib.sha256).digest()[:16].hex()


def is_held_out(site_key: bytes, patient_id: str, study: str) -> bool:
    """Tells whether the patient's cases judge instead of train; a patient is never on both sides.

    Without a PatientID the study decides: all nameless patients of a hospital on one side would be no
    split.
    """
    digest = hmac.new(site_key, f"held-out|{patient_id or study}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def patient_pseudonym(site_key: bytes, patient: str) -> str:
    """Returns the name under which one patient's objects are exported: the same for all of them at this site."""
    return "RF" + hmac.new(site_key, f"patient|{patient}".encode(), hashlib.sha256).digest()[:8].hex().upper()


def mapped_uid(site_key: bytes, uid: str) -> str:
    """Returns the UID that stands for `uid` in everything that leaves: below 2.25 (PS3.5 B.2), the same every time."""
    digest = hmac.new(site_key, f"uid|{uid}".encode(), hashlib.sha256).digest()
    return f"2.25.{uuid.UUID(bytes=digest[:16], version=4).int}"


def date_shift_days(site_key: bytes, patient: str) -> int:
    """Returns how many days a patient's dates move, always back: a date in the future would give the shift away."""
    digest = hmac.new(site_key, f"dates|{patient}".encode(), hashlib.sha256).digest()
    return -(MIN_SHIFT_DAYS + int.from_bytes(digest[:8], "big") % (MAX_SHIFT_DAYS - MIN_SHIFT_DAYS + 1))
