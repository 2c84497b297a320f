"""What the worker does with an opened message: one row each, the same row when it comes twice.

Each handler runs in the transaction of the message's own row; raising PeerError makes the verdict `refused`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from sqlalchemy import Connection, Row, Table, insert, select, update

from cloud.objects import Objects
from cloud.rounds.guard import inspect
from cloud.rounds.tables import features, judgements, rounds, updates
from shared.clock import Clock
from shared.errors import PeerError
from shared.update.layout import Entry, Layout
from shared.wire.envelope import Header
from shared.wire.records import FeatureBatch, HeadJudgement, Judgement, ModelUpdate

MAX_FEATURES = 4096  # values of one embedding
MAX_CLASSES = 1000


Handler = Callable[[Connection, Header, Any], None]


def handlers(objects: Objects, clock: Clock) -> dict[str, Handler]:
    """Returns the worker's handlers of the stages `features`, `update` and `judgement`."""
    return {
        "features": lambda conn, sender, batch: take_features(conn, sender, batch, clock),
        "update": lambda conn, sender, sent: take_update(conn, sender, sent, objects, clock),
        "judgement": lambda conn, sender, sent: take_judgement(conn, sender, sent, clock),
    }


def take_features(conn: Connection, sender: Header, batch: FeatureBatch, clock: Clock) -> None:
    """Stores embeddings with their newest confirmed label.

    Raises:
        PeerError: an embedding is empty, too long, of odd length or not finite, or a label is out of range.
    """
    for row in batch.rows:
        _check_embedding(row.features)
        if not 0 <= row.label < MAX_CLASSES:
            raise PeerError(f"The label {row.label} is out of range.")
        key = {
            "site": sender.site, "case": row.case, "package": batch.package, "variant": batch.variant,
        }  # fmt: skip
        values = {
            "head": row.head, "label": row.label, "held_out": row.held_out, "data": row.features,
            "received_at": clock.now(),
        }  # fmt: skip
        _put(conn, features, key, values)


def take_update(conn: Connection, sender: Header, sent: ModelUpdate, objects: Objects, clock: Clock) -> None:
    """Opens an update, measures it, keeps its blob. One that comes after the average is recorded as late.

    Raises:
        PeerError: no such round, another update of this node before, or the guard refuses it.
    """
    row = _round(conn, sent.round)
    length = inspect(sent, layout_of(row.layout), row.base, row.max_norm)
    values = {
        "cases": sent.cases,
        "norm": length,
        "loss_before": sent.loss_before,
        "loss_after": sent.loss_after,
        "blob": objects.put(sent.blob) if sent.cases else None,
        "length": len(sent.blob),
    }
    marks = {"late": not row.collecting, "received_at": clock.now()}
    _put_once(conn, updates, sent.round, sender, values, marks)


def take_judgement(conn: Connection, sender: Header, sent: Judgement, clock: Clock) -> None:
    """Stores a hospital's comparison of champion and candidate.

    Raises:
        PeerError: no such round, not its candidate, a negative count, or another judgement before.
    """
    row = _round(conn, sent.round)
    if row.candidate != sent.candidate:
        raise PeerError("The judgement is not about this round's candidate.")
    if any(n < 0 for head in sent.heads for n in head.per_class):
        raise PeerError("A count of cases is negative.")
    heads = {"heads": [msgspec.to_builtins(_finite(head)) for head in sent.heads]}
    _put_once(conn, judgements, sent.round, sender, heads, {"received_at": clock.now()})


def layout_of(stored: list[list[Any]]) -> Layout:
    """Returns the layout that a round's row describes."""
    return Layout(tuple(Entry(name, tuple(shape)) for name, shape in stored))


def _finite(head: HeadJudgement) -> HeadJudgement:
    """JSON has no NaN: what is not a number becomes -9, out of every range, so that the gate refuses it."""
    values = {name: getattr(head, name) for name in head.__struct_fields__}
    broken = {n: -9.0 for n, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return msgspec.structs.replace(head, **broken)


def _check_embedding(data: bytes) -> None:
    if not 0 < len(data) <= 2 * MAX_FEATURES or len(data) % 2:
        raise PeerError(f"An embedding of {len(data)} bytes is refused.")
    if not np.isfinite(np.frombuffer(data, "<f2")).all():
        raise PeerError("An embedding holds values that are not finite.")


def _round(conn: Connection, id: str) -> Row[Any]:
    row = conn.execute(select(rounds).where(rounds.c.id == id)).first()
    if row is None:
        raise PeerError(f"There is no round {id[:40]!r}.")
    return row


def _put(conn: Connection, table: Table, key: dict[str, Any], values: dict[str, Any]) -> None:
    same = [table.c[name] == value for name, value in key.items()]
    if not conn.execute(update(table).where(*same).values(**values)).rowcount:
        conn.execute(insert(table).values(**key, **values))


def _put_once(
    conn: Connection,
    table: Table,
    round: str,
    sender: Header,
    values: dict[str, Any],
    marks: dict[str, Any],
) -> None:
    """A node has one answer a round: the same one again changes nothing, another one is refused."""
    key = {"round": round, "site": sender.site, "node": sender.node}
    same = [table.c[name] == value for name, value in key.items()]
    row = conn.execute(select(table).where(*same)).mappings().first()
    if row is None:
        conn.execute(insert(table).values(**key, **values, **marks))
    elif any(row[name] != value for name, value in values.items()):
        raise PeerError("This node has answered in this round, with something else.")
