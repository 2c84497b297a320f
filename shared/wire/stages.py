"""What each stage carries upwards, how long it may be, and its canonical bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import msgspec

from shared.errors import PeerError
from shared.wire.records import FeatureBatch, Judgement, ModelUpdate, NodeReport, UpStage

KIB, MIB = 1024, 1024 * 1024

UpRecord: TypeAlias = FeatureBatch | ModelUpdate | Judgement | NodeReport
_T = TypeVar("_T", bound=msgspec.Struct)

# What msgspec raises for bytes that are no such record; its own family lacks bad UTF-8 and deep nesting.
MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


@dataclass(frozen=True, slots=True)
class Stage:
    """One kind of message: the record it carries and its limits in bytes, sealed and decompressed."""

    name: UpStage
    record: type[UpRecord]
    sealed_limit: int
    plain_limit: int


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("features", FeatureBatch, 8 * MIB, 16 * MIB),
        Stage("update", ModelUpdate, 64 * MIB, 64 * MIB),
        Stage("judgement", Judgement, 256 * KIB, 1 * MIB),
        Stage("report", NodeReport, 64 * KIB, 256 * KIB),
    )
}


def stage_named(name: str) -> Stage:
    """Returns the stage.

    Raises:
        PeerError: there is no such stage.
    """
    try:
        return STAGES[name]
    except KeyError as exc:
        raise PeerError(f"There is no stage {name[:40]!r}.") from exc


def encode(record: msgspec.Struct) -> bytes:
    """Returns a record's bytes: msgpack with the fields in their declared order."""
    return msgspec.msgpack.encode(record)


def decode(data: bytes, record: type[_T]) -> _T:
    """Reads a record strictly.

    Raises:
        PeerError: the bytes are not such a record.
    """
    try:
        return msgspec.msgpack.decode(data, type=record)
    except MALFORMED as exc:
        raise PeerError(f"The body is not a {record.__name__}: {exc}.") from exc
