"""The DICOM Conformance Statement (PS3.2 annex A), written from the code's own tables.

python -m scripts.lab.conformance [--check]     writes docs/conformance.md, or fails when it is not up to date
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydicom.uid import UID
from pynetdicom import sop_class

from edge.config import RoomSection
from edge.forward import fetch, peer
from edge.forward.store import EXPLICIT, IMPLICIT
from edge.intake import commitment, door, pdu, services
from edge.intake.association import MAX_PDU_BYTES
from edge.intake.door import ARTIM_S, IDLE_S
from edge.intake.meta import IMPLEMENTATION_NAME, IMPLEMENTATION_UID
from edge.intake.part import OBJECT_LIMIT_BYTES
from edge.intake.peers import MAX_ASSOCIATIONS, PEER_ASSOCIATIONS
from edge.intake.status import BY_HTTP, STATUS, Outcome
from edge.intake.syntaxes import STORAGE_COMMITMENT, VERIFICATION, storage_classes, transfer_syntaxes
from edge.intake.tls import SUITES
from edge.web.dicomweb import media, routes

FILE = Path(__file__).resolve().parents[2] / "docs" / "conformance.md"
SR, SC, RLE = "1.2.840.10008.5.1.4.1.1.88.34", "1.2.840.10008.5.1.4.1.1.7", "1.2.840.10008.1.2.5"

_NEWER = {  # than the dictionary
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
}
# What each outcome means for whoever reads the sender's log.
MEANING = {
    Outcome.STORED: "Success: on disk, synced and indexed",
    Outcome.DUPLICATE: "Success: the same bytes are held already",
    Outcome.CONFLICT: "Success: kept beside other bytes of the same SOP Instance UID, flagged",
    Outcome.IDENTITY_CONFLICT: "Success: kept beside, of another patient or with other pixels; not read",
    Outcome.NO_ROOM: "Refused: Out of Resources: disk, quota or the limit of one object",
    Outcome.MISMATCH: "Error: Data Set does not match SOP Class or SOP Instance of the command",
    Outcome.CUT: "Error: Cannot understand: the data set ends before its own lengths say so",
    Outcome.BAD_UID: "Invalid SOP Instance: the SOP Instance UID of the command is not a UID",
    Outcome.FAULT: "Processing Failure: our disk or index failed; the sender may try again",
}
REJECTIONS = {
    services.NOT_THIS_CALLED_AE: "Called AE Title Not Recognized",
    services.NOT_THIS_CALLING_AE: "Calling AE Title Not Recognized (title, or address for this title)",
    services.NOT_THIS_APPLICATION: "Application Context Name Not Supported",
    services.NOT_THIS_PROTOCOL: "Protocol Version Not Supported",
    services.CONGESTED: f"Temporary Congestion: the spool is at {services.FULL:.0%} of its room",
    services.TOO_MANY: "Local Limit Exceeded: of this peer, or of the door",
}
COMMITMENT = {
    commitment.SUCCESS: "Success: the report follows",
    commitment.NO_SUCH_ACTION: "No Such Action: action types other than 1",
    commitment.NO_SUCH_OBJECT: "No Such SOP Instance: not the well-known instance",
    commitment.INVALID_ARGUMENT: "Invalid Argument Value: no transaction UID, no references, or too many",
    commitment.PROCESSING_FAILURE: "Processing Failure: the index failed; ask again",
}
REASONS = {
    commitment.NO_SUCH_INSTANCE: "No Such Object Instance: not here, or not whole on the disk",
    commitment.CLASS_CONFLICT: "Class/Instance Conflict: held under another SOP class",
}


def statement() -> str:
    """Returns the document."""
    storage, syntaxes = sorted(storage_classes(), key=_order), transfer_syntaxes()
    return "\n".join(
        [
            *_overview(),
            *_door(),
            *_contexts(storage, syntaxes),
            *_answers(),
            *_callers(),
            *_web(),
            *_rest(),
        ]
    )


def _overview() -> list[str]:
    return [
        "# DICOM Conformance Statement: Radfleet edge node",
        "",
        "Research use only, not for diagnosis. Written by `python -m scripts.lab.conformance` from the tables that the",
        "programs run by, in the form of PS3.2 annex A; `tests/edge/test_conformance.py` holds it against a "
        "running door.",
        "",
        "## 1 Conformance statement overview",
        "",
        "| network service | user (SCU) | provider (SCP) |",
        "|---|---|---|",
        "| Verification | yes | yes |",
        "| Storage, every SOP class of 4.2.1.3 | yes | yes |",
        "| Storage Commitment Push Model | no | yes |",
        "| Study Root Query/Retrieve, FIND and MOVE | yes | no |",
        "| DICOMweb: STOW-RS, QIDO-RS, WADO-RS | no | yes (origin server) |",
        "",
        "There is no media interchange, no query/retrieve provider over DIMSE, no worklist and no MPPS. Contents: 1",
        "overview, 3 introduction, 4 networking, 5 media, 6 transformation to CDA, 7 character sets, 8 "
        "security, 9 annexes.",
        "",
        "## 3 Introduction",
        "",
        "For whoever connects a modality or an archive to a node. Statuses are hexadecimal. An object that "
        "was answered",
        "with Success is synced to the disk; what that means under a power cut is in tests/attacks/test_power_cut.py.",
        "",
    ]


def _door() -> list[str]:
    return [
        "## 4 Networking",
        "",
        "### 4.1 Implementation model",
        "",
        "Two application entities with one AE title. DOOR takes objects and answers for them; CALLER sends "
        "results to the",
        "PACS, forwards by rules, and fetches priors and missed images from archives. The objects of DICOMweb come in",
        "through the same spool as those of DOOR.",
        "",
        "### 4.2 AE specifications",
        "",
        "#### 4.2.1 DOOR",
        "",
        "##### 4.2.1.1 Association policies",
        "",
        "| item | value |",
        "|---|---|",
        f"| application context | {pdu.APPLICATION_CONTEXT} |",
        f"| implementation class UID | {IMPLEMENTATION_UID} |",
        f"| implementation version name | {IMPLEMENTATION_NAME} |",
        f"| maximum length received | {MAX_PDU_BYTES} bytes |",
        f"| associations at a time | {MAX_ASSOCIATIONS}; of one peer at most {PEER_ASSOCIATIONS}, or as configured |",
        f"| connections before an association | {door.SILENT_CONNECTIONS} that are silent,"
        f" {door.SPEAKING_CONNECTIONS} that speak; the oldest gives way |",
        f"| ARTIM | {ARTIM_S:.0f} s for a whole association request |",
        f"| silence in an association | {IDLE_S:.0f} s, then the connection is closed |",
        "| asynchronous operations window | 1 invoked, 1 performed, whatever is proposed; requests that are sent"
        " nevertheless are answered in order |",
        f"| presentation contexts | {pdu.MAX_CONTEXTS}, each with at most {pdu.MAX_SYNTAXES} transfer syntaxes |",
        f"| size of one object | {OBJECT_LIMIT_BYTES} bytes, or as configured for the peer |",
        "",
        "##### 4.2.1.2 Association initiation",
        "",
        "DOOR opens an association only for a Storage Commitment report whose association has ended, in the "
        "role of the",
        "SCP, to the port that the configuration names for the peer: first after "
        f"{commitment.RETRY_BASE_S:.0f} s, then",
        f"later and later up to {commitment.RETRY_CAP_S:.0f} s apart, {commitment.MAX_TRIES} times.",
        "",
        "##### 4.2.1.3 Association acceptance",
        "",
        "A caller is accepted when the called AE title is the node's own and the calling AE title and "
        "address are on the",
        "allow-list or were admitted on the page; an empty list admits nobody. Rejections, by the numbers of "
        "PS3.8 table",
        "9-21:",
        "",
        *_rows(
            ("result", "source", "reason", "meaning"),
            ((*map(str, numbers), what) for numbers, what in REJECTIONS.items()),
        ),
        "Bytes that are no PDU, or a PDU that has no place, end the association with A-ABORT, source 2, and "
        "the reason of",
        "PS3.8 table 9-26: 1 unrecognized PDU, 2 unexpected PDU, 6 invalid parameter value.",
        "",
        "SCP/SCU role selection: the requestor is accepted as SCU of every accepted class, never as SCP. SOP class",
        f"extended negotiation of storage classes is answered with {services.EXTENDED_ANSWER.hex(' ')}:",
        "level 2 (full), bit-preserving signatures, no coercion. User identity is not negotiated.",
        "",
    ]


def _contexts(storage: Sequence[str], syntaxes: Sequence[str]) -> list[str]:
    return [
        "A context of any storage class with any of these transfer syntaxes is accepted; of several in one context the",
        "one that stands first here is taken. Everything is kept as received.",
        "",
        *_rows(("transfer syntax", "UID"), ((_name(uid), uid) for uid in syntaxes)),
        f"Verification ({VERIFICATION}) and Storage Commitment Push Model ({STORAGE_COMMITMENT}) are accepted with the",
        "first three of them. A context of another class gets result 3, one without a known transfer syntax result 4.",
        "",
        f"{len(storage)} storage SOP classes, retired ones too; private ones by configuration "
        "(`dicom.private_classes`):",
        "",
        *_rows(("SOP class", "UID"), ((_name(uid), uid) for uid in storage)),
    ]


def _answers() -> list[str]:
    return [
        "##### 4.2.1.4 C-STORE",
        "",
        "One answer for each request, after the object is durable. The error comment (0000,0902) says in "
        "words what the",
        "status says by number. What is refused is kept in a quarantine under a quota and shown to nobody but an",
        "administrator.",
        "",
        *_rows(
            ("outcome", "status", "meaning"),
            ((one.value, f"{STATUS[one]:04X}", MEANING[one]) for one in STATUS if one not in BY_HTTP),
        ),
        f"Requests of other services on an accepted context get {services.UNRECOGNIZED_OPERATION:04X} (Unrecognized"
        " Operation).",
        "",
        "##### 4.2.1.5 C-ECHO",
        "",
        "0000.",
        "",
        "##### 4.2.1.6 Storage Commitment Push Model",
        "",
        f"N-ACTION names 1 to {commitment.REFERENCES_LIMIT} instances. The report comes on the same "
        "association at once;",
        "when it ends unanswered, on a new one (4.2.1.2).",
        "",
        "The commitment is for a time (PS3.4 J.1.1): an instance that a report calls safe stays, bit for bit,",
        f"for `room.retention_days` ({RoomSection().retention_days:g} days unless configured) after the latest such",
        "report, however full the disk is. It is deleted after that, and only when it was read, its results were",
        "delivered and it was forwarded wherever a rule says so; what cannot be read or is in identity conflict stays",
        "until a person lets it go. Meanwhile it is retrieved by WADO-RS, at once; no C-FIND or C-MOVE is provided.",
        "The spool holds `room.spool_limit_bytes`; new instances are refused when it is full (4.2.1.4), new",
        f"associations above {services.FULL:.0%} of it. The node is no archive: an SCU that deletes its copy after the",
        "report must have sent it to one. Storage Media File-Set and Retrieve AE Title are not used.",
        "",
        *_rows(("N-ACTION status", "meaning"), ((f"{status:04X}", what) for status, what in COMMITMENT.items())),
        *_rows(("failure reason", "meaning"), ((f"{reason:04X}", what) for reason, what in REASONS.items())),
    ]


def _callers() -> list[str]:
    models = {
        "C-FIND": fetch.StudyRootQueryRetrieveInformationModelFind,
        "C-MOVE": fetch.StudyRootQueryRetrieveInformationModelMove,
    }
    return [
        "#### 4.2.2 CALLER",
        "",
        "| service | SOP class | transfer syntaxes proposed |",
        "|---|---|---|",
        f"| C-ECHO | {_name(VERIFICATION)} | {_name(IMPLICIT)}, {_name(EXPLICIT)} |",
        f"| C-STORE of results | {_name(SR)} ({SR}) | {_name(EXPLICIT)} |",
        f"| C-STORE of results | {_name(SC)} ({SC}) | {_name(RLE)}, {_name(EXPLICIT)} |",
        "| C-STORE of what was received | as received | as received; beside it "
        f"{_name(EXPLICIT)} and {_name(IMPLICIT)} |",
        *(f"| {name} | {_name(str(model))} ({model}) | uncompressed |" for name, model in models.items()),
        "",
        f"A peer is given {peer.CONNECT_S:.0f} s to connect and {peer.ANSWER_S:.0f} s for an answer, longer for large"
        " objects. What is not taken is tried",
        "again, later and later; it is never dropped silently. C-MOVE names the node's own AE title as destination.",
        "",
    ]


def _web() -> list[str]:
    source = inspect.getsource(routes)
    parts = {name: getattr(routes, name) for name in ("_SERIES", "_INSTANCE")}
    found = []
    for method, text in re.findall(r"@router\.(get|post)\(((?:_\w+)?(?: \+ )?(?:\"[^\"]*\")?)", source):
        words = [parts.get(word, word.strip('"')) for word in text.split(" + ")]
        found.append((method.upper(), "".join(words)))
    return [
        "#### 4.2.3 DICOMweb",
        "",
        "An origin server over what the spool holds, for whoever is signed in on the page.",
        "",
        *_rows(("method", "resource"), found),
        f"Media types: `{media.DICOM}` (single and multipart/related), `{media.JSON}`, `{media.OCTETS}` for bulk data,",
        "rendered `image/jpeg` and `image/png`; frames as stored: "
        f"{', '.join(sorted(set(media.COMPRESSED.values())))}.",
        "",
        "### 4.3 Network interfaces",
        "",
        "TCP/IP, IPv4 and IPv6. Port 11112 by default, 2762 with TLS; both configurable.",
        "",
        "### 4.4 Configuration",
        "",
        "AE title, host, ports, allow-list (AE titles with `*` and `?`, addresses and networks), limits of "
        "each peer, private",
        "SOP classes, TLS, destinations and rules: one TOML file, commented, written by `radfleet-edge init`.",
        "",
    ]


def _rest() -> list[str]:
    return [
        "## 5 Media interchange",
        "",
        "None. The spool holds Part 10 files for the node's own use.",
        "",
        "## 6 Transformation of DICOM to CDA",
        "",
        "None.",
        "",
        "## 7 Support of character sets",
        "",
        "Objects are kept as received, whatever their character set. Texts on the page are decoded by "
        "Specific Character",
        "Set; what cannot be decoded is shown with replacement characters. Objects made here are in ISO_IR "
        "192 (UTF-8).",
        "",
        "## 8 Security",
        "",
        "A second port speaks TLS 1.2 and 1.3, client certificates required, the server's order of suites "
        "first. The profile",
        "is chosen by `dicom.tls.profile`: `bcp195` is the BCP 195 RFC 8996, 9325 TLS Secure Transport "
        "Connection Profile,",
        "`non-downgrading` its non-downgrading kind. The suites of TLS 1.3 are those of the TLS library; of "
        "TLS 1.2 these:",
        "",
        *_rows(("profile", "suite"), ((name, suite) for name, suites in SUITES.items() for suite in suites)),
        "Objects that leave for learning or by `radfleet-edge export` are de-identified by the Basic Application Level",
        "Confidentiality Profile (PS3.15 annex E).",
        "",
        "## 9 Annexes",
        "",
        f"Objects made here: {_name(SR)} (TID 1500) and {_name(SC)}, both marked as unverified and as research",
        "use only. No private attribute, no private SOP class and no private transfer syntax is defined. Nothing in a",
        "received object is changed.",
        "",
    ]


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def _name(uid: str) -> str:
    known = UID(uid).name
    if known == uid:
        keyword = next((name for name, value in vars(sop_class).items() if str(value) == uid), "")
        known = _NEWER.get(uid) or re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", keyword)
    return known


def _order(uid: str) -> list[int]:
    return [int(part) for part in uid.split(".")]


def main() -> None:
    """See the module's docstring."""
    text = statement()
    if "--check" in sys.argv:
        if FILE.read_text() != text:
            sys.exit("docs/conformance.md is not up to date. Cure: python -m scripts.lab.conformance")
        return
    FILE.write_text(text)


if __name__ == "__main__":
    main()
