"""Topics `radfleet/1/<site>/<node>/up/<stage>` and `.../down/<stage>`: built and read here, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from shared.errors import PeerError
from shared.wire.identity import Identity
from shared.wire.records import DownStage, UpStage

ROOT = "radfleet/1"
TOPIC_LIMIT_CHARACTERS = 128
ALL_UP = f"{ROOT}/+/+/up/+"

_STAGES = {"up": frozenset(get_args(UpStage)), "down": frozenset(get_args(DownStage))}


@dataclass(frozen=True, slots=True)
class Topic:
    """What a topic says: whose it is, which way it goes and which stage it carries."""

    identity: Identity
    direction: Literal["up", "down"]
    stage: str


def up(identity: Identity, stage: UpStage) -> str:
    """Returns the topic on which a node sends."""
    return f"{ROOT}/{identity.common_name}/up/{stage}"


def down(identity: Identity, stage: DownStage) -> str:
    """Returns the topic on which the cloud answers one node."""
    return f"{ROOT}/{identity.common_name}/down/{stage}"


def all_down(identity: Identity) -> str:
    """Returns the filter a node subscribes to: everything the cloud says to it, and to nobody else."""
    return f"{ROOT}/{identity.common_name}/down/+"


def parse(topic: str) -> Topic:
    """Reads a topic strictly.

    Raises:
        PeerError: other shape, version, name or stage than the ones above.
    """
    if len(topic) > TOPIC_LIMIT_CHARACTERS:
        raise PeerError(f"The topic has {len(topic)} characters, the limit is {TOPIC_LIMIT_CHARACTERS}.")
    parts = topic.split("/")
    if len(parts) != 6 or "/".join(parts[:2]) != ROOT:
        raise PeerError(f"{topic!r} is not a topic of {ROOT}.")
    direction, stage = parts[4], parts[5]
    if stage not in _STAGES.get(direction, frozenset()):
        raise PeerError(f"{topic!r} names no stage.")
    return Topic(Identity(parts[2], parts[3]), "up" if direction == "up" else "down", stage)
