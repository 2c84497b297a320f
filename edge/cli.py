"""`radfleet-edge`: set up, enrol, run, look, check, export, release."""

from __future__ import annotations

import os
import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from cryptography import x509
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edge import app as parts
from edge import cli_dicom
from edge.config import TEMPLATE, EdgeConfig, load_config
from edge.enrolment import enrol as enrol_node
from edge.identity import read_identity
from edge.imaging.export import export_object, objects_of
from edge.intake.release import ask, stuck
from edge.report import node_report, room_state, withheld_count
from edge.slots.journal import Journal
from edge.web.labels import Labels
from shared.clock import SystemClock
from shared.console import run_cli
from shared.errors import ConfigError, PeerError, RadfleetError
from shared.files import atomic_write, read_limited
from shared.log import configure
from shared.package.manifest import verify_package
from shared.supervise import read_facts, stop_on_signals

CONSOLE_ACTOR = "console"
KEY_LIMIT_BYTES = 100_000

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
app.add_typer(cli_dicom.app)
app.add_typer(cli_dicom.forward, name="forward")
out = Console(highlight=False, soft_wrap=True, markup=False)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The node's TOML file.")]
DEFAULT_CONFIG = Path("edge.toml")


@app.command()
def init(folder: Path) -> None:
    """Writes FOLDER/edge.toml and the state folder; prints the first administrator's one-time link once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "edge.toml"
    if not path.exists():
        atomic_write(path, TEMPLATE.encode(), mode=0o644)
    config = load_config(path)
    link = parts.found(config)
    out.print(f"Configuration: {path}\nState: {config.state}")
    if link is None:
        out.print("There are people already; an administrator invites others.")
    else:
        out.print(f"First administrator, valid once for a day: {parts.web_url(config)}/welcome/{link}")


@app.command()
def enrol(url: str, token: str, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Enrols the node with the cloud at URL by the TOKEN that `radfleet-cloud invite` printed."""
    node = enrol_node(url, token, load_config(config).state)
    out.print(f"Enrolled as {node.site}/{node.node}.")


@app.command()
def person(name: str, role: Annotated[str, typer.Option()], config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Prints a one-time link with which NAME sets a password: a new person, or one who forgot it."""
    settings = load_config(config)
    labels = Labels(settings.state / "labels.sqlite", SystemClock())
    link = labels.invite(name, role, actor=CONSOLE_ACTOR)
    labels.close()
    out.print(f"{parts.web_url(settings)}/welcome/{link}")


@app.command()
def run(
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(parts.PROCESSES)}.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Runs the node until SIGTERM or Ctrl-C; with --only, one of its processes."""
    if only is not None and only not in parts.PROCESSES:
        raise ConfigError(f"There is no process {only}.", cure=f"Choose one of {', '.join(parts.PROCESSES)}.")
    if only:
        process = parts.process_command(only, config.resolve())
        os.execv(process[0], process)  # noqa: S606 this interpreter, words of ours
    stop = stop_on_signals()
    settings = load_config(config)
    node = read_identity(settings.state)
    configure("edge", **({"site": node.site, "node": node.node} if node else {}))
    parts.supervise(config.resolve(), settings, stop, lambda line: print(line, flush=True))  # noqa: T201


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Shows who the node is, which processes run, and what it serves."""
    settings = load_config(config)
    node = read_identity(settings.state)
    journal = Journal(settings.state / "slots.sqlite", SystemClock())
    report = node_report(settings.state, journal.reports(), clock_trusted=True)
    journal.close()
    ready = read_facts(settings.run_folder / "ready.json")
    room = room_state(settings.state)
    if as_json:
        body = {
            "node": node,
            "processes": ready,
            "report": {
                **msgspec.structs.asdict(report),
                "slots": [msgspec.structs.asdict(slot) for slot in report.slots],
            },
            "room": room,
        }
        out.print(msgspec.json.encode(body).decode())
        return
    table = Table(show_header=False)
    table.add_row("node", f"{node.site}/{node.node}" if node else "not enrolled")
    table.add_row("processes", ", ".join(ready) or "not running")
    table.add_row("model", f"{report.package[:12]} release {report.release} {report.variant}")
    table.add_row("serving", f"pid {report.serving_pid}, golden {report.golden[:12]}")
    table.add_row("studies", f"{report.studies} answered, {report.quarantined} in quarantine")
    table.add_row("labels", f"{report.labelled}, {withheld_count(settings.state)} kept out of learning")
    table.add_row("room", room.text if room else "no word yet")
    table.add_row("outbox", f"{report.outbox_waiting} waiting, {report.outbox_expired} expired")
    for slot in report.slots:
        table.add_row("slot", f"{slot.release} {slot.package[:12]} {slot.state} {slot.reason}")
    Console(highlight=False).print(table)


@app.command()
def export(
    study: Annotated[str, typer.Option(help="Study Instance UID.")],
    to: Annotated[Path, typer.Option(help="Folder for the files; what stands there is not overwritten.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Writes a study's objects, de-identified by PS3.15 Annex E; ends with 65 when any was refused."""
    state = load_config(config).state
    kept = objects_of(state / "intake.sqlite", study)
    site_key = read_limited(state / "site.key", parts.SITE_KEY_BYTES)
    to.mkdir(parents=True, exist_ok=True)
    results = [
        export_object(one, state / "spool", to, site_key)
        for one in track(kept, "De-identifying", console=Console(stderr=True))
    ]
    for one in results:
        places = f", {len(one.blacked)} places blacked" if one.blacked else ""
        out.print(f"{one.digest[:12]}  {one.name}{places}" if one.name else f"{one.digest[:12]}  refused: {one.reason}")
    refused = sum(not one.name for one in results)
    out.print(f"{len(results) - refused} written, {refused} refused. Research use only, not for diagnosis.")
    if refused:
        raise typer.Exit(PeerError.exit_code)


@app.command()
def release(
    digests: Annotated[list[str] | None, typer.Argument(help="Beginnings of digests; without any, lists them.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Lets go of objects that cannot be read or are in identity conflict; nothing else lets them go."""
    state = load_config(config).state
    for one in ask(state, digests) if digests else stuck(state):
        since = f"{datetime.fromtimestamp(one.stored_at, UTC):%Y-%m-%d}"
        out.print(f"{one.digest[:12]}  {since}  {one.length} bytes  {one.modality} from {one.calling_ae}: {one.why}")
    if digests:
        out.print("The intake process lets them go; what was committed stays until its retention is over.")


@app.command()
def check(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Checks configuration, disk, model and peers; ends with 78 when the operator must act."""
    settings = load_config(config)
    table = Table("what", "result")
    faults = [f"{what}: {fault}" for what, fault in _checks(settings, table) if fault]
    Console(highlight=False).print(table)
    if faults:
        raise ConfigError(f"{len(faults)} check(s) failed.", faults=faults)


def _checks(settings: EdgeConfig, table: Table) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def note(what: str, good: str, fault: str) -> None:
        table.add_row(what, fault or good)
        found.append((what, fault))

    state = settings.state
    note("state", str(state), "" if (state / "site.key").exists() else "run `radfleet-edge init`")
    note("room", "enough", _room(settings))
    note("model", "whole and as its manifest says", _model(state))
    allowed = ", ".join(peer.ae_title for peer in settings.dicom.allow)
    note("door", f"allows {allowed}", "" if allowed else "[dicom] allow is empty: every modality is refused")
    if settings.pacs:
        where = f"{settings.pacs.host}:{settings.pacs.port}"
        note("pacs", f"{where} accepts", _reach(settings.pacs.host, settings.pacs.port))
    else:
        note("pacs", "none: reports stay on this node", "")
    for one in settings.destination:
        note(f"destination {one.name}", f"{one.host}:{one.port} accepts", _reach(one.host, one.port))
    node = read_identity(state)
    if node:
        note("certificate", "valid", _certificate(state))
        note("broker", "accepts", _reach(node.broker_host, node.broker_port))
    else:
        note("cloud", "not enrolled: the node works alone", "")
    return found


def _room(settings: EdgeConfig) -> str:
    total = shutil.disk_usage(settings.state if settings.state.exists() else settings.state.parent).total
    wanted = settings.room.spool_limit_bytes
    return "" if total >= wanted else f"the disk has {total} bytes; [room] spool_limit_bytes is {wanted}"


def _model(state: Path) -> str:
    """Checks what serving needs; weights are only on nodes that got the package with the software."""
    if not (state / "slots.sqlite").exists():
        return "none; run `radfleet-edge init`"
    journal = Journal(state / "slots.sqlite", SystemClock())
    committed = journal.committed()
    journal.close()
    if committed is None:
        return "none; run `radfleet-edge init`"
    folder = state / "models" / committed[0]
    try:
        manifest = verify_package(folder, committed[0], names=[])
        present = [one.file for one in manifest.variants if (folder / one.file).exists()]
        verify_package(folder, committed[0], names=[manifest.golden, *present])
    except RadfleetError as exc:
        return exc.message
    return "" if present else "no variant of it is on this disk"


def _certificate(state: Path) -> str:
    data = read_limited(state / "pki" / "device.pem", KEY_LIMIT_BYTES)
    end = x509.load_pem_x509_certificate(data).not_valid_after_utc
    return "" if end > SystemClock().now() else f"expired on {end:%Y-%m-%d}; enrol the node again"


def _reach(host: str, port: int) -> str:
    try:
        with socket.create_connection((host, port), timeout=5):
            return ""
    except OSError as exc:
        return f"{host}:{port} cannot be reached ({exc})"


def main() -> None:
    """Entry point of `radfleet-edge`."""
    run_cli(app)
