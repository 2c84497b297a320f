"""Whether an image says itself that it cannot wait."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edge.forward.facts import BIG_ENDIAN, DEFLATED, read_facts_head
from edge.imaging.read import lenient_text
from shared.errors import StateError

_URGENT = frozenset({"STAT", "HIGH"})
_NAMED = (0x00401003, 0x0032000C)  # RequestedProcedurePriority; StudyPriorityID, retired
_PIXEL_DATA = 0x7FE00010
_GLANCE_BYTES = 64 * 1024


def says_urgent(path: Path, offset: int, transfer_syntax: str) -> bool:
    """Tells whether RequestedProcedurePriority (0040,1003) or the retired StudyPriorityID (0032,000C) is STAT or HIGH.

    Raises:
        StateError: the file is gone or the disk fails.
    """
    if _says_nothing(path, offset, transfer_syntax):
        return False
    head = read_facts_head(path, offset, transfer_syntax, last_tag=max(_NAMED)).dataset
    said = (lenient_text(head, name, 16).upper() for name in ("RequestedProcedurePriority", "StudyPriorityID"))
    return any(one in _URGENT for one in said)


def _says_nothing(path: Path, offset: int, transfer_syntax: str) -> bool:
    """True when the bytes before the pixels hold neither tag: nearly every image, without walking its elements."""
    if transfer_syntax == DEFLATED:
        return False
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(_GLANCE_BYTES)
    except OSError as exc:
        raise StateError(f"Cannot read {path.name}: {exc.strerror}.") from exc
    order: Literal["big", "little"] = "big" if transfer_syntax == BIG_ENDIAN else "little"
    pixels = data.find(_bytes_of(_PIXEL_DATA, order))
    return pixels >= 0 and not any(data.find(_bytes_of(tag, order)) >= 0 for tag in _NAMED)


def _bytes_of(tag: int, order: Literal["big", "little"]) -> bytes:
    return (tag >> 16).to_bytes(2, order) + (tag & 0xFFFF).to_bytes(2, order)
