"""Whether an image says itself that it cannot wait."""

from __future__ import annotations

from pathlib import Path

from edge.forward.facts import read_facts_head
from edge.imaging.read import lenient_text

_URGENT = frozenset({"STAT", "HIGH"})
_LAST_TAG = 0x00401003  # RequestedProcedurePriority


def says_urgent(path: Path, offset: int, transfer_syntax: str) -> bool:
    """Tells whether RequestedProcedurePriority (0040,1003) or the retired StudyPriorityID (0032,000C) is STAT or HIGH.

    Raises:
        StateError: the file is gone or the disk fails.
    """
    head = read_facts_head(path, offset, transfer_syntax, last_tag=_LAST_TAG).dataset
    said = (lenient_text(head, name, 16).upper() for name in ("RequestedProcedurePriority", "StudyPriorityID"))
    return any(one in _URGENT for one in said)
