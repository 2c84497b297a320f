"""What would happen to a file that a modality sends, and why: door, rules, destinations, head. Nothing is stored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from msgspec import Struct
from pydicom.dataset import FileMetaDataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID

from edge.forward.routes import Routes
from edge.forward.rules import SENT, Facts, failing
from edge.imaging.read import describe, open_object
from edge.imaging.route import NotAssessed, route
from edge.intake.head import read_head, valid_uid
from edge.intake.status import STATUS, Outcome
from edge.intake.walk import CutError
from shared.errors import PeerError
from shared.package.manifest import Head


class DoorRules(Struct, frozen=True):
    """What the door goes by: `allowed` tells whether a calling AE title may come from an address."""

    allowed: Callable[[str, str], bool]
    ours: str
    classes: Collection[str]
    syntaxes: Collection[str]


class WhatIf(Struct, frozen=True):
    """The answers, each as it is shown."""

    file: str
    caller: str
    door: str
    rule: str = ""
    passed: tuple[str, ...] = ()  # rules before it, each with the condition that does not hold
    action: str = ""
    destinations: tuple[str, ...] = ()
    priority: str = ""
    head: str = ""


class _Told(Struct, frozen=True):
    calling_ae: str
    called_ae: str
    sop_class: str
    study: str


def what_if(
    path: Path,
    routes: Routes,
    heads: Sequence[Head],
    where: Mapping[str, str],
    rules: DoorRules,
    *,
    calling_ae: str,
    address: str,
    called_ae: str,
) -> WhatIf:
    """Returns what would happen to a Part 10 file.

    Args:
        path: the file.
        routes: the configured rules.
        heads: of the model that serves.
        where: destinations by name, as text.
        rules: what the door goes by.
        calling_ae, address, called_ae: who would send it, from where, and to which of our AE titles.

    Raises:
        StateError: the file cannot be read from the disk.
    """
    caller = _caller(rules, calling_ae, address, called_ae)
    door, meta = _door(path, rules)
    if meta is None:
        return WhatIf(str(path), caller, door)
    try:
        dataset = open_object(path)
    except PeerError as exc:
        return WhatIf(str(path), caller, door, head=f"cannot be read: {exc.message}")
    study = str(dataset.get("StudyInstanceUID", ""))
    facts = routes.facts(dataset, _Told(calling_ae, called_ae, str(meta.MediaStorageSOPClassUID), study))
    decision = routes.decide(facts)
    passed = () if facts.ours or facts.prior else _passed(routes, facts)
    return WhatIf(
        file=str(path),
        caller=caller,
        door=door,
        rule=decision.why,
        passed=passed,
        action=decision.action,
        destinations=tuple(f"{name} ({where.get(name, 'unknown')})" for name in decision.destinations),
        priority=decision.priority if decision.action in SENT else "",
        head=_head(dataset, heads) if decision.read else "not asked: the rule does not have it analysed",
    )


def _caller(rules: DoorRules, calling_ae: str, address: str, called_ae: str) -> str:
    if called_ae != rules.ours:
        return f"rejected: this node is {rules.ours}, not {called_ae}"
    if not rules.allowed(calling_ae, address):
        return f"rejected: {calling_ae} from {address} is in no [dicom] allow and was not admitted on the page"
    return f"{calling_ae} from {address} is allowed"


def _door(path: Path, rules: DoorRules) -> tuple[str, FileMetaDataset | None]:
    """Returns the door's verdict, and the file's meta information unless there is nothing to go on with."""
    try:
        meta = read_file_meta_info(path)
        said = (str(meta.MediaStorageSOPClassUID), str(meta.MediaStorageSOPInstanceUID))
        # preamble, "DICM" and the group length's own element stand before what it counts
        offset = 128 + 4 + 12 + int(meta.FileMetaInformationGroupLength)
        head = read_head(path, offset, str(meta.TransferSyntaxUID))
    except CutError as exc:
        return _refused(Outcome.CUT, exc.message), None
    except Exception as exc:  # noqa: BLE001 pydicom names no family for damaged input
        return f"not a DICOM file with file meta information ({type(exc).__name__})", None
    refused = ""
    if said[0] not in rules.classes or meta.TransferSyntaxUID not in rules.syntaxes:
        return (
            f"no presentation context: the door takes no {UID(said[0]).name} as {meta.TransferSyntaxUID.name}; private"
            " classes are named in [dicom] private_classes"
        ), None
    if not valid_uid(said[1]):
        refused = _refused(Outcome.BAD_UID, "the SOP Instance UID is not a UID")
    for told, has in zip(said, (head.sop_class, head.sop_instance), strict=True):
        if has and has != told:
            refused = _refused(Outcome.MISMATCH, f"the meta information says {told}, the data set {has}")
    if refused:
        return refused, None
    if head.fault:
        return f"kept (0x0000), and quarantined when it is read: {head.fault}", meta
    return "kept (0x0000)", meta


def _refused(outcome: Outcome, why: str) -> str:
    return f"refused with 0x{STATUS[outcome]:04X}: {why}"


def _passed(routes: Routes, facts: Facts) -> tuple[str, ...]:
    passed = []
    for rule in routes.rules:
        condition = failing(rule, facts)
        if not condition:
            break
        shown = getattr(facts, condition) or "empty"
        passed.append(f"{rule.name}: {condition} is {shown}, not {' or '.join(getattr(rule, condition))}")
    return tuple(passed)


def _head(dataset: object, heads: Sequence[Head]) -> str:
    try:
        image = describe(dataset)  # type: ignore[arg-type]
    except PeerError as exc:
        return f"quarantined: {exc.message}"
    if not image.has_pixels:
        return "none: the object has no pixels"
    found = route(heads, image)
    return f"not assessed: {found.reason}" if isinstance(found, NotAssessed) else f"{found.name} ({found.title})"
