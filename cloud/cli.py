"""`radfleet-cloud`: set up, run, invite, release, roll out, learn, back up."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from cloud.config import PROCESSES, TEMPLATE, load_config
from cloud.registry.officer import create_officer, sign_proposal
from shared.clock import SystemClock
from shared.console import run_cli
from shared.errors import ConfigError
from shared.files import atomic_write
from shared.log import configure
from shared.supervise import stop_on_signals

if TYPE_CHECKING:
    from cloud.parts import Cloud

CONSOLE_ACTOR = "console"  # whoever may read the state folder; the machine's own accounts say who that is

app = typer.Typer(no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
release_app = typer.Typer(no_args_is_help=True, help="Officers, proposals and published releases.")
campaign_app = typer.Typer(no_args_is_help=True, help="Learning with the hospitals.")
audit_app = typer.Typer(no_args_is_help=True, help="The audit log.")
app.add_typer(release_app, name="release")
app.add_typer(campaign_app, name="campaign")
app.add_typer(audit_app, name="audit")
out = Console(highlight=False, soft_wrap=True, markup=False)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="The cloud's TOML file.")]
DEFAULT_CONFIG = Path("cloud.toml")


def _open(config: Path) -> Cloud:
    """Returns the cloud of a configuration; imported here because officers' commands need nothing of it."""
    from cloud.parts import Cloud

    return Cloud(load_config(config))


@app.command()
def init(folder: Path) -> None:
    """Writes FOLDER/cloud.toml and the state folder; prints the first administrator's one-time link once."""
    from cloud.parts import Cloud, found

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cloud.toml"
    if not path.exists():
        atomic_write(path, TEMPLATE.encode(), mode=0o644)
    config = load_config(path)
    link = found(config, SystemClock())
    out.print(f"Configuration: {path}\nState: {config.state}")
    if link is None:
        out.print("There are people already; an administrator invites others.")
    else:
        out.print(f"First administrator, valid once for a day: {Cloud(config).people_url}/welcome/{link}")


@app.command()
def invite(site: str, node: str, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Prints a single-use token with which the node SITE/NODE enrols within the hour."""
    from cloud.access import enrolment

    cloud = _open(config)
    cloud.welcome()  # without officers a node would enrol and then trust nobody
    with cloud.engine.begin() as conn:
        token = enrolment.invite(conn, cloud.clock, cloud.authority, site, node, actor=CONSOLE_ACTOR)
    out.print(token)


@app.command()
def person(name: str, role: Annotated[str, typer.Option()], config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Prints a one-time link with which NAME sets a password: a new person, or one who forgot it."""
    from cloud.access import people

    cloud = _open(config)
    with cloud.engine.begin() as conn:
        link = people.invite_person(conn, cloud.clock, name, people.role_named(role), actor=CONSOLE_ACTOR)
    out.print(f"{cloud.people_url}/welcome/{link}")


@app.command()
def run(
    only: Annotated[str | None, typer.Option(help=f"One of {', '.join(PROCESSES)}.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Runs the cloud until SIGTERM or Ctrl-C; with --only, one of its processes."""
    if only is not None and only not in PROCESSES:
        raise ConfigError(f"There is no process {only}.", cure=f"Choose one of {', '.join(PROCESSES)}.")
    from cloud.app import run_process, supervise

    stop = stop_on_signals()
    configure(only or "cloud")
    cloud = _open(config)
    if only:
        run_process(only, cloud, stop)
    else:
        supervise(config.resolve(), cloud, stop, lambda line: print(line, flush=True))  # noqa: T201


@app.command()
def rollout(
    release: int,
    all_nodes: Annotated[bool, typer.Option("--all", help="Every node of the fleet.")] = False,
    node: Annotated[list[str] | None, typer.Option(help="SITE/NODE; may be repeated.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Orders a published RELEASE on all or on named nodes."""
    from cloud.app import deeds

    cloud = _open(config)
    with cloud.engine.begin() as conn:
        deeds(cloud).roll_out(conn, release, _nodes(all_nodes, node), CONSOLE_ACTOR)
    out.print(f"Release {release} is ordered.")


@app.command()
def rollback(
    all_nodes: Annotated[bool, typer.Option("--all", help="Every node of the fleet.")] = False,
    node: Annotated[list[str] | None, typer.Option(help="SITE/NODE; may be repeated.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Sends all or named nodes back to the release before, by explicit signed permission."""
    from cloud.app import deeds

    cloud = _open(config)
    with cloud.engine.begin() as conn:
        deeds(cloud).roll_back(conn, _nodes(all_nodes, node), CONSOLE_ACTOR)
    out.print("The release before is ordered.")


@campaign_app.command("start")
def campaign_start(
    lane: Annotated[str, typer.Option(help="both, fast or slow.")] = "both",
    max_rounds: Annotated[int, typer.Option(min=1)] = 6,
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Starts learning with every node: the fast lane, then rounds until the gate passes a candidate."""
    from cloud.app import deeds

    cloud = _open(config)
    with cloud.engine.begin() as conn:
        plan = {"lane": lane, "max_rounds": max_rounds}
        out.print(deeds(cloud).start_campaign(conn, plan, CONSOLE_ACTOR))


@release_app.command("officer")
def release_officer(folder: Path, name: str) -> None:
    """Makes NAME a release officer: keys in FOLDER, on the officer's own machine; prints the public file."""
    out.print(str(create_officer(folder, name)))


@release_app.command("propose")
def release_propose(
    officer: Annotated[list[Path], typer.Argument(help="public.json of every officer, two at least.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Proposes the officers as the fleet's root of trust, with the shipped model as the first release.

    Later releases are proposed by the gate alone.
    """
    cloud = _open(config)
    out.print(str(cloud.repository.propose_root(officer, founding=cloud.baseline())))


@release_app.command("sign")
def release_sign(officer: Path, proposal: Path) -> None:
    """Re-verifies the folder PROPOSAL and signs it with the keys in the folder OFFICER; needs no cloud."""
    out.print(str(sign_proposal(officer, proposal)))


@release_app.command("publish")
def release_publish(proposal: Path, config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Publishes the folder PROPOSAL once a threshold of officers has signed it."""
    cloud = _open(config)
    published = cloud.publish(proposal, CONSOLE_ACTOR)
    out.print(f"Published release {published.release}.")


@release_app.command("list")
def release_list(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Shows proposals and releases, newest first."""
    from cloud.web.fleet import list_releases

    cloud = _open(config)
    table = Table("release", "package", "state", "gate", "published", "proposal")
    with cloud.engine.begin() as conn:
        cloud.sync_releases(conn)
        for row in list_releases(conn):
            gate = row["verdict"]["decision"] if row["verdict"] else "founding"
            proposal = cloud.proposal_of(row["release"])
            cells = [str(row["release"]), row["package"][:12], row["state"], gate]
            table.add_row(*cells, row["published_at"] or "", str(proposal or ""))
    Console(highlight=False).print(table)


@app.command()
def backup(
    file: Path,
    passphrase_file: Annotated[Path, typer.Option(help="A file with the passphrase.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Writes the keys, the registry and the database into one encrypted FILE."""
    from cloud.access.backup import write_backup

    cloud = _open(config)
    count = write_backup(cloud.config.state, cloud.engine, file, passphrase_file)
    out.print(f"{count} files and tables in {file}.")


@app.command()
def restore(
    file: Path,
    passphrase_file: Annotated[Path, typer.Option(help="The file with the passphrase.")],
    config: ConfigOption = DEFAULT_CONFIG,
) -> None:
    """Puts a backup into an empty state folder."""
    from cloud.access.backup import read_backup

    settings = load_config(config)
    count = read_backup(file, passphrase_file, settings.state, settings.database.url)
    out.print(f"{count} files and tables restored to {settings.state}.")


@audit_app.command("verify")
def audit_verify(config: ConfigOption = DEFAULT_CONFIG) -> None:
    """Recomputes the audit log's chain and prints its length and newest digest."""
    from cloud.access import audit

    with _open(config).engine.connect().execution_options(read_only=True) as conn:
        count, digest = audit.verify(conn)
    out.print(f"{count} entries, unchanged. Newest digest: {digest}")


def _nodes(all_nodes: bool, named: list[str] | None) -> list[tuple[str, str]] | None:
    if all_nodes == bool(named):
        raise ConfigError("Say which nodes.", cure="Give --all, or --node SITE/NODE once or more.")
    pairs = [name.partition("/") for name in named or ()]
    return None if all_nodes else [(site, node) for site, _, node in pairs]


def main() -> None:
    """Entry point of `radfleet-cloud`."""
    run_cli(app)
