"""DICOM by hand, in the manner of DCMTK: echo, send, find, move; and what the rules would do with a file."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import msgspec
import typer
from pydicom.filereader import read_file_meta_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from edge import app as parts
from edge.config import EdgeConfig, load_config
from edge.forward import reading
from edge.forward.fetch import Level, Moved, as_texts
from edge.forward.fetch import find as find_at
from edge.forward.fetch import move as move_from
from edge.forward.peer import Peer, Tls, association
from edge.forward.peer import echo as echo_to
from edge.forward.schedule import judge
from edge.forward.store import MAX_KINDS, NotTakenError, contexts_for, send_file
from edge.forward.whatif import DoorRules, WhatIf, what_if
from edge.intake.syntaxes import storage_classes, transfer_syntaxes
from edge.slots.journal import Journal
from shared.clock import SystemClock
from shared.errors import ConfigError, LinkError, PeerError
from shared.files import read_limited
from shared.package.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, Head, decode_manifest, verify_package

app = typer.Typer(pretty_exceptions_enable=False)
forward = typer.Typer(no_args_is_help=True, help="What is forwarded, and what a destination did not take.")
out = Console(highlight=False, soft_wrap=True, markup=False)

DEFAULT_CONFIG = Path("edge.toml")
Host = Annotated[str, typer.Argument(help="Host name or address of the peer.")]
Port = Annotated[int, typer.Argument(min=1, max=65535, help="Its DICOM port.")]
Called = Annotated[str, typer.Option("--aec", help="The peer's AE title.")]
Calling = Annotated[str, typer.Option("--aet", help="Our AE title.")]
WithTls = Annotated[bool, typer.Option("--tls", help="Speak TLS; needs --ca.")]
Ca = Annotated[Path | None, typer.Option(help="PEM file with the CAs that are trusted.")]
Cert = Annotated[Path | None, typer.Option(help="PEM file with our certificate chain.")]
Key = Annotated[Path | None, typer.Option("--key", help="PEM file with the key of that certificate.")]
Keys = Annotated[list[str], typer.Option("--match", "-k", help="KEYWORD=VALUE to match, KEYWORD to be told.")]
ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The node's TOML file.")]
LevelOption = Annotated[str, typer.Option(help="study, series or image.")]

_TOLD: dict[Level, tuple[str, ...]] = {
    "STUDY": ("PatientID", "StudyDate", "ModalitiesInStudy", "StudyDescription", "StudyInstanceUID"),
    "SERIES": ("Modality", "SeriesNumber", "SeriesDescription", "NumberOfSeriesRelatedInstances", "SeriesInstanceUID"),
    "IMAGE": ("InstanceNumber", "SOPClassUID", "SOPInstanceUID"),
}


class Found(NamedTuple):
    """One DICOM file to send."""

    path: Path
    sop_class: str
    transfer_syntax: str


@app.command()
def echo(
    host: Host,
    port: Port,
    aec: Called = "ANY-SCP",
    aet: Calling = "RADFLEET",
    tls: WithTls = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Asks a DICOM peer whether it is there (C-ECHO)."""
    peer = _peer(host, port, aec, tls, ca, cert, key)
    echo_to(peer, ours=aet)
    out.print(f"{peer} answers.")


@app.command()
def send(
    host: Host,
    port: Port,
    paths: Annotated[list[Path], typer.Argument(help="Files, and folders with all that is in them.")],
    aec: Called = "ANY-SCP",
    aet: Calling = "RADFLEET",
    tls: WithTls = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Sends files (C-STORE), as they are where the peer takes their transfer syntax, else uncompressed."""
    peer = _peer(host, port, aec, tls, ca, cert, key)
    found, skipped = _dicom_files(paths)
    for path, why in skipped:
        out.print(f"skipped {path}: {why}")
    if not found:
        raise PeerError("There is no DICOM file to send.", cure="Name files with file meta information, or folders.")
    counts: Counter[str] = Counter()
    with _progress() as progress, tempfile.TemporaryDirectory(prefix="radfleet-send-") as scratch:
        task = progress.add_task("sending", total=len(found))
        for batch in _batches(found):
            for one, said in _send_batch(peer, batch, aet, Path(scratch)):
                counts["failed" if said else "sent"] += 1
                if said:
                    progress.console.print(f"not taken {one.path}: {said}")
                progress.advance(task)
    out.print(f"{counts['sent']} sent, {counts['failed']} not taken, {len(skipped)} skipped.")
    if counts["failed"]:
        raise PeerError(f"{counts['failed']} of {len(found)} files were not taken.", cure="The reasons stand above.")


@app.command()
def find(
    host: Host,
    port: Port,
    match: Keys = [],  # noqa: B006 typer reads it as the default
    level: LevelOption = "study",
    aec: Called = "ANY-SCP",
    aet: Calling = "RADFLEET",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    tls: WithTls = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Asks what a peer holds (C-FIND, Study Root) and shows it as a table."""
    at = _level(level)
    wanted = dict.fromkeys(_TOLD[at], "") | _keys(match)
    matches = find_at(_peer(host, port, aec, tls, ca, cert, key), at, wanted, ours=aet)
    rows = [as_texts(one) for one in matches]
    if as_json:
        for row in rows:
            out.print(msgspec.json.encode({name: row.get(name, "") for name in wanted}).decode())
        return
    table = Table(*wanted)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in wanted))
    Console(highlight=False, markup=False).print(table)
    out.print(f"{len(rows)} found.")


@app.command()
def move(
    host: Host,
    port: Port,
    match: Keys = [],  # noqa: B006 typer reads it as the default
    level: LevelOption = "study",
    to: Annotated[str, typer.Option(help="AE title that the peer sends to; it must know it. Ours when not said.")] = "",
    aec: Called = "ANY-SCP",
    aet: Calling = "RADFLEET",
    tls: WithTls = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Has a peer send what it holds to an AE title (C-MOVE, Study Root), as a rule to this node's door."""
    wanted = _keys(match)
    if not wanted:
        raise PeerError("Nothing was named to move.", cure="As in -k StudyInstanceUID=1.2.3.")
    last = Moved(0, 0, 0, 0)
    with _progress() as progress:
        task = progress.add_task("moving", total=None)
        peer = _peer(host, port, aec, tls, ca, cert, key)
        for last in move_from(peer, _level(level), wanted, to=to or aet, ours=aet):
            done = last.completed + last.warned + last.failed
            progress.update(task, completed=done, total=(done + last.remaining) or None)
    out.print(f"{last.completed + last.warned} moved, {last.failed} failed.")
    if last.failed:
        raise LinkError(
            f"{last.failed} objects were not moved.", cure="Look at the log of the peer and of the receiver."
        )
    if not last.completed + last.warned:
        raise PeerError("Nothing matches.", cure="Try the same keys with find.")


@app.command()
def whatif(
    files: list[Path],
    aet: Annotated[str, typer.Option(help="AE title of who would send them.")] = "MODALITY",
    aec: Annotated[str, typer.Option(help="Our AE title that is called; as configured when not said.")] = "",
    address: Annotated[str, typer.Option(help="The address they would come from.")] = "127.0.0.1",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Says what would happen to files that are sent to this node, and why; nothing is stored."""
    settings = load_config(config)
    routes, heads, where, door = parts.routes(settings), _heads(settings), parts.destinations(settings), _door(settings)
    called = aec or settings.dicom.ae_title
    for path in files:
        told = what_if(path, routes, heads, where, door, calling_ae=aet, address=address, called_ae=called)
        out.print(_whatif_table(told))
    out.print("Research use only, not for diagnosis.")


@forward.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Shows each destination's queue, what it did not take, and what was fetched."""
    settings = load_config(config)
    path = settings.state / "forward.sqlite"
    queues = reading.destinations(path, parts.destinations(settings))
    letters, fetches = reading.dead_letters(path), reading.fetches(path)
    not_read = reading.not_read(settings.state / "results.sqlite")
    if as_json:
        body = {"destinations": queues, "dead": letters, "fetches": fetches, "not_read": not_read}
        out.print(msgspec.json.encode(body).decode())
        return
    table = Table("destination", "where", "waiting", "sent", "dead", "dropped", "last error", "cure")
    for one in queues:
        where = one.where if one.configured else "not configured any more"
        table.add_row(
            one.name, where, *map(str, (one.waiting, one.sent, one.dead, one.dropped)), one.last_error, one.cure
        )
    console = Console(highlight=False, markup=False)
    console.print(table)
    if letters:
        table = Table("id", "destination", "modality", "from", "tries", "error", "cure")
        for letter in letters:
            said = (
                letter.destination,
                letter.modality,
                letter.calling_ae,
                str(letter.tries),
                letter.error,
                letter.cure,
            )
            table.add_row(str(letter.id), *said)
        console.print(table)
    for fetch in fetches:
        why = f": {fetch.last_error} {fetch.cure}" if fetch.last_error else ""
        out.print(f"{fetch.kind} from {fetch.source}: {fetch.count} {fetch.state}, {fetch.moved} objects{why}")
    for action, count in not_read.items():
        out.print(f"{count} objects were not analysed: {action}")


@forward.command()
def retry(
    ids: Annotated[list[int] | None, typer.Argument(help="Ids that `forward list` shows.")] = None,
    destination: Annotated[str, typer.Option(help="All that this destination did not take.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Asks the forward process to try dead objects again."""
    _ask("retry", ids or [], destination, config)


@forward.command()
def drop(
    ids: Annotated[list[int] | None, typer.Argument(help="Ids that `forward list` shows.")] = None,
    destination: Annotated[str, typer.Option(help="All that this destination did not get, waiting too.")] = "",
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Gives up what a destination will never take; until then its bytes hold room in the spool."""
    _ask("drop", ids or [], destination, config)


def _ask(action: Literal["retry", "drop"], ids: list[int], destination: str, config: Path) -> None:
    if bool(ids) == bool(destination):
        raise ConfigError("Say ids or --destination.", cure="Look at `radfleet-edge forward list`.")
    parts.forward_requests(load_config(config)).leave(reading.Request("console", action, ids, destination))
    out.print("Asked.")


def _peer(host: str, port: int, aec: str, tls: bool, ca: Path | None, cert: Path | None, key: Path | None) -> Peer:
    if tls != (ca is not None) or (cert is None) != (key is None) or (cert and not tls):
        raise ConfigError("--tls and --ca go together, and --cert and the key with them.", cure="Name PEM files.")
    return Peer(aec, aec, host, port, Tls(ca, cert, key) if ca else None)


def _keys(keys: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (one.partition("=") for one in keys)}


def _level(text: str) -> Level:
    for level in _TOLD:
        if text.upper() == level:
            return level
    raise PeerError(f"There is no level {text}.", cure="One of study, series, image.")


def _dicom_files(paths: Sequence[Path]) -> tuple[list[Found], list[tuple[Path, str]]]:
    found: list[Found] = []
    skipped: list[tuple[Path, str]] = []
    for path in _files(paths):
        try:
            meta = read_file_meta_info(path)
            found.append(Found(path, str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)))
        except Exception as exc:  # noqa: BLE001 pydicom names no family for damaged input
            skipped.append((path, f"no DICOM file with file meta information ({type(exc).__name__})"))
    return found, skipped


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(one for one in path.rglob("*") if one.is_file())
        else:
            yield path


def _batches(found: Sequence[Found]) -> Iterator[list[Found]]:
    """One association takes a limited number of presentation contexts, and message ids end at 65535."""
    batch: list[Found] = []
    kinds: set[tuple[str, str]] = set()
    for one in found:
        kind = (one.sop_class, one.transfer_syntax)
        if len(kinds | {kind}) > MAX_KINDS or len(batch) == 10_000:
            yield batch
            batch, kinds = [], set()
        batch.append(one)
        kinds.add(kind)
    yield batch


def _send_batch(peer: Peer, batch: Sequence[Found], ours: str, scratch: Path) -> Iterator[tuple[Found, str]]:
    """Yields each file with why the peer did not take it; one that ends the association is followed by a new one."""
    contexts = contexts_for((one.sop_class, one.transfer_syntax) for one in batch)
    left = list(batch)
    while left:
        with association(peer, contexts, ours=ours) as link:
            while left:
                one = left.pop(0)
                try:
                    said = _send_one(link, one, len(batch) - len(left), scratch)
                except LinkError as exc:
                    yield one, f"{exc.message} {exc.cure}"
                    link.abort()
                    break
                yield one, said


def _send_one(link: object, one: Found, message: int, scratch: Path) -> str:
    """Returns why the peer did not take the file; empty when it did. LinkError when it hung up."""
    try:
        status = send_file(
            link,
            one.path,
            (one.sop_class, one.transfer_syntax),
            length=one.path.stat().st_size,
            message=message,
            scratch=scratch,
        )
    except NotTakenError as exc:
        return f"{exc.message} {exc.cure}"
    verdict = judge(status, 0)
    return "" if verdict.state == "sent" else f"{verdict.error}. {verdict.cure}"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, markup=False),
    )


def _heads(settings: EdgeConfig) -> list[Head]:
    """Returns the heads of the model that serves; those of the shipped one before there is a node."""
    if not (settings.state / "slots.sqlite").exists():
        return _shipped_heads()
    journal = Journal(settings.state / "slots.sqlite", SystemClock())
    committed = journal.committed()
    journal.close()
    if committed is None:
        return _shipped_heads()
    return verify_package(settings.state / "models" / committed[0], committed[0], names=[]).heads


def _door(settings: EdgeConfig) -> DoorRules:
    dicom, allow = settings.dicom, parts.allow_list(settings)
    return DoorRules(
        lambda title, address: allow.find(title, address) is not None,
        dicom.ae_title,
        storage_classes(dicom.private_classes),
        transfer_syntaxes(),
    )


def _shipped_heads() -> list[Head]:
    data = read_limited(parts.shipped_package() / MANIFEST_NAME, MANIFEST_LIMIT_BYTES)
    return decode_manifest(data).heads


def _whatif_table(told: WhatIf) -> Table:
    table = Table(show_header=False, title=told.file, title_justify="left")
    table.add_row("caller", told.caller)
    table.add_row("door", told.door)
    if told.action:
        for line in told.passed:
            table.add_row("passed over", line)
        table.add_row("rule", told.rule)
        table.add_row("action", told.action)
        if told.priority:
            table.add_row("destinations", ", ".join(told.destinations) or "none")
            table.add_row("priority", told.priority)
    if told.head:
        table.add_row("model", told.head)
    return table
