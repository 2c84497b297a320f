"""Messages of several chunks, collected in SQL until they are whole; a killed worker loses none of them."""

from __future__ import annotations

import hashlib
from datetime import datetime

from sqlalchemy import ColumnElement, Connection, delete, func, insert, select, update

from cloud.ingest.tables import chunks, transfers
from shared.errors import TrustError
from shared.wire.chunks import Chunk, Whole, bitmap
from shared.wire.identity import Identity

OPEN_LIMIT_BYTES = 128 * 1024 * 1024  # unfinished transfers of one node; the one longest untouched gives way


def collect(conn: Connection, identity: Identity, chunk: Chunk, now: datetime) -> bytes | None:
    """Keeps one chunk, in the caller's transaction; returns the sealed message once it is whole.

    A whole message is no longer kept here. The digest under which chunks are kept is the one they claim, so
    pieces of two sealings never mix.

    Raises:
        TrustError: the pieces are complete and their digest is not the one each of them claimed.
    """
    whole = chunk.whole
    key = _key(identity, whole)
    mine = (transfers.c.site == identity.site) & (transfers.c.node == identity.node)
    this = mine & (transfers.c.digest == key["digest"])
    if conn.execute(update(transfers).where(this).values(touched_at=now)).rowcount == 0:
        _make_room(conn, identity, whole.total)
        conn.execute(insert(transfers).values(**key, total=whole.total, touched_at=now))
    if chunk.index not in _held(conn, identity, whole):
        conn.execute(insert(chunks).values(**key, number=chunk.index, data=chunk.data))
    if len(_held(conn, identity, whole)) < whole.count:
        return None
    pieces = conn.execute(select(chunks.c.data).where(_chunks_of(identity, whole)).order_by(chunks.c.number))
    sealed = b"".join(piece.data for piece in pieces)
    drop(conn, identity, whole)
    if hashlib.sha256(sealed).digest() != whole.digest:
        raise TrustError("The chunks do not add up to the digest that each of them claims.")
    return sealed


def held(conn: Connection, identity: Identity, whole: Whole) -> bytes:
    """Returns the bitmap of the chunks kept so far."""
    return bitmap(_held(conn, identity, whole), whole.count)


def drop(conn: Connection, identity: Identity, whole: Whole) -> None:
    """Forgets a transfer and its chunks."""
    conn.execute(delete(chunks).where(_chunks_of(identity, whole)))
    conn.execute(
        delete(transfers).where(
            transfers.c.site == identity.site,
            transfers.c.node == identity.node,
            transfers.c.digest == whole.digest.hex(),
        )
    )


def _key(identity: Identity, whole: Whole) -> dict[str, str]:
    return {"site": identity.site, "node": identity.node, "digest": whole.digest.hex()}


def _chunks_of(identity: Identity, whole: Whole) -> ColumnElement[bool]:
    return (chunks.c.site == identity.site) & (chunks.c.node == identity.node) & (chunks.c.digest == whole.digest.hex())


def _held(conn: Connection, identity: Identity, whole: Whole) -> set[int]:
    return set(conn.execute(select(chunks.c.number).where(_chunks_of(identity, whole))).scalars())


def _make_room(conn: Connection, identity: Identity, total: int) -> None:
    """Ends the node's oldest unfinished transfers until `total` more bytes fit; they are sent again."""
    mine = (transfers.c.site == identity.site) & (transfers.c.node == identity.node)
    while True:
        used = conn.execute(select(func.coalesce(func.sum(transfers.c.total), 0)).where(mine)).scalar_one()
        if used == 0 or used + total <= OPEN_LIMIT_BYTES:
            return
        oldest = conn.execute(select(transfers).where(mine).order_by(transfers.c.touched_at).limit(1)).one()
        drop(conn, identity, Whole("0" * 32, bytes.fromhex(oldest.digest), oldest.total))
