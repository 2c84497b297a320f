"""Names that leave the record: keyed, so that nobody without the site's key can go back or compare
hospitals.
"""

from __future__ import annotations

import hashlib
import hmac

HELD_OUT_ONE_IN = 3  # cases that a hospital keeps for judging, never for training


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
