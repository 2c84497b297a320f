"""What the door takes: SOP classes and transfer syntaxes, and the negotiation over them (PS3.8 9.3.2, PS3.7 D.3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from pydicom._uid_dict import UID_dictionary
from pynetdicom.presentation import AllStoragePresentationContexts, NonPatientObjectPresentationContexts
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from edge.intake.pdu import Accepted, Proposed

VERIFICATION = str(Verification)
STORAGE_COMMITMENT = str(StorageCommitmentPushModel)

_FIRST = (  # a sender that offers several in one context gets the one that costs it least
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.2",  # explicit VR big endian
    "1.2.840.10008.1.2.1.99",  # deflated
    "1.2.840.10008.1.2.4.70",  # JPEG lossless, selection value 1
    "1.2.840.10008.1.2.4.57",  # JPEG lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.90",  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.201",  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202",  # HTJ2K lossless RPCL
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.4.50",  # JPEG baseline
    "1.2.840.10008.1.2.4.51",  # JPEG extended
)
# Not encodings of stored objects: MIME, XML, and the syntaxes of real-time video (PS3.22).
_NOT_STORED = ("1.2.840.10008.1.2.6.", "1.2.840.10008.1.2.7.")
# Newer than the dictionary: JPEG XL.
_NEWER = ("1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112")


def transfer_syntaxes() -> tuple[str, ...]:
    """Returns every transfer syntax of a stored object, retired ones too, first choice first. All are kept as
    received; what imaging can decode is its own matter."""
    known = [
        uid
        for uid, (_, kind, *_) in UID_dictionary.items()
        if kind == "Transfer Syntax" and not uid.startswith(_NOT_STORED)
    ]
    return tuple(dict.fromkeys((*_FIRST, *known, *_NEWER)))


def storage_classes(private: Sequence[str] = ()) -> frozenset[str]:
    """Returns every storage SOP class that pynetdicom or pydicom knows, retired ones too, and the private ones."""
    known = {str(one.abstract_syntax) for one in AllStoragePresentationContexts + NonPatientObjectPresentationContexts}
    known |= {
        uid
        for uid, (name, kind, *_) in UID_dictionary.items()
        if kind == "SOP Class" and "Storage" in name and uid.startswith("1.2.840.10008.5.1.4.")
    }
    return frozenset(known | set(private))


def negotiate(proposed: Sequence[Proposed], storage: frozenset[str], syntaxes: Sequence[str]) -> tuple[Accepted, ...]:
    """Returns the answer to each context: accepted (0), abstract syntax (3) or transfer syntaxes (4) not supported."""
    answers = []
    for one in proposed:
        uncompressed = one.abstract_syntax in (VERIFICATION, STORAGE_COMMITMENT)
        if one.abstract_syntax not in storage and not uncompressed:
            answers.append(Accepted(one.context_id, one.abstract_syntax, one.transfer_syntaxes[0], 3))
            continue
        offered = set(one.transfer_syntaxes)
        chosen = next((uid for uid in (syntaxes[:3] if uncompressed else syntaxes) if uid in offered), "")
        answers.append(
            Accepted(one.context_id, one.abstract_syntax, chosen or one.transfer_syntaxes[0], 0 if chosen else 4)
        )
    return tuple(answers)
