"""Who this node is, as enrolment wrote it down."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from shared.errors import StateError
from shared.files import read_limited

FILE_LIMIT_BYTES = 1_000_000


class NodeIdentity(Struct, frozen=True):
    """`node.json`: who this node is and where its cloud is; written last, so it exists only when all else does."""

    site: str
    node: str
    incarnation: str
    cloud_url: str
    nodes_url: str
    broker_host: str
    broker_port: int


def read_identity(state: Path) -> NodeIdentity | None:
    """Returns who the node is; None before it was enrolled; StateError when the file is damaged."""
    path = state / "node.json"
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(read_limited(path, FILE_LIMIT_BYTES), type=NodeIdentity)
    except msgspec.MsgspecError as exc:
        raise StateError(f"{path} is damaged: {exc}.", cure="Enrol the node again.") from exc
