"""The releases as the fleet page and the rounds see them; the signed repository is the truth, this is its index."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import (
    Column,
    Connection,
    Integer,
    LargeBinary,
    String,
    Table,
    insert,
    select,
    update,
)

from cloud.registry.proposal import VERDICT_NAME, read_payload, read_proposal
from cloud.registry.repository import ReleaseRepository
from cloud.store import METADATA, Moment
from shared.package.manifest import MANIFEST_NAME, decode_manifest

releases = Table(
    "releases",
    METADATA,
    Column("release", Integer, primary_key=True, autoincrement=False),
    Column("package", String(64), nullable=False),  # SHA-256 of the manifest
    Column("name", String(100), nullable=False),
    Column("verdict", LargeBinary),  # the gate's record; null for the founding release
    Column("state", String(16), nullable=False),  # proposed, signed, published
    Column("proposed_at", Moment, nullable=False),
    Column("signed_at", Moment),
    Column("published_at", Moment),
)


def sync(connection: Connection, repository: ReleaseRepository, now: datetime) -> int:
    """Brings the table to what the repository's proposals and published releases say; returns the rows changed.

    Safe to repeat, so a crash between publishing and this call is healed by the next one.
    """
    known = {row.release: row.state for row in connection.execute(select(releases.c.release, releases.c.state))}
    changed = 0
    for folder in sorted(repository.proposals.glob("[!.]*/")):
        proposal = read_proposal(folder)
        state = repository.state(folder)
        if proposal.release == 0 or known.get(proposal.release) == state:
            continue
        changed += 1
        if proposal.release not in known:
            manifest = decode_manifest(read_payload(folder, f"package/{MANIFEST_NAME}"))
            connection.execute(
                insert(releases).values(
                    release=proposal.release,
                    package=proposal.package,
                    name=manifest.name,
                    verdict=read_payload(folder, VERDICT_NAME) if proposal.kind == "release" else None,
                    state=state,
                    proposed_at=datetime.fromisoformat(proposal.created),
                )
            )
        times = {f"{step}_at": now for step in _passed(known.get(proposal.release), state)}
        connection.execute(update(releases).where(releases.c.release == proposal.release).values(state=state, **times))
    return changed


def _passed(before: str | None, after: str) -> list[str]:
    order = ["proposed", "signed", "published"]
    return order[max(1, order.index(before or "proposed") + 1) : order.index(after) + 1]
