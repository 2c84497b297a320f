"""C-STORE of a Part 10 file to a peer, as it is where the peer takes its transfer syntax, else transcoded."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification

from edge.forward.peer import ANSWER_S, SLOWEST_BYTES_S
from edge.forward.transcode import to_little_endian
from edge.intake.head import valid_uid
from shared.errors import LinkError, PeerError

EXPLICIT, IMPLICIT = str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian)
MAX_KINDS = 64  # (SOP class, transfer syntax) pairs that one association can hold, two contexts each
_DICOM_PRIORITY = {0: 1, 1: 0, 2: 2}  # ours to PS3.7 9.1.1.1.4: 0 is MEDIUM there, 1 HIGH


class NotTakenError(PeerError):
    """The peer takes this object neither as it is nor transcoded; it will not do so later either."""


def contexts_for(kinds: Iterable[tuple[str, str]]) -> list[PresentationContext]:
    """Returns what to propose for (SOP class, transfer syntax) pairs: each as stored, and uncompressed beside it.

    What is no UID is not proposed; `send_file` then says that the peer does not take it.
    """
    wanted = dict.fromkeys(kind for kind in kinds if all(valid_uid(uid) for uid in kind))
    found = [build_context(*kind) for kind in wanted]
    for sop_class in dict.fromkeys(kind[0] for kind in wanted):
        plain = [one for one in (EXPLICIT, IMPLICIT) if (sop_class, one) not in wanted]
        if plain:
            found.append(build_context(sop_class, plain))
    return found or [build_context(Verification)]  # no association proposes nothing


def send_file(
    found: Any,
    path: Path,
    kind: tuple[str, str],
    *,
    length: int,
    message: int,
    scratch: Path,
    priority: int = 1,
    transcoding: Callable[[], None] = lambda: None,
) -> int:
    """Returns the status with which the peer answered.

    Args:
        found: an association with `contexts_for` at least this file's kind.
        path: a Part 10 file.
        kind: its SOP class and transfer syntax.
        length: its bytes; the longer it is, the longer the peer may take.
        message: message id, 1..65535.
        scratch: a folder for a transcoded copy, removed after it was sent.
        priority: 0 high, 1 normal, 2 low.
        transcoding: is called before pixels are decoded.

    Raises:
        LinkError: the association ended before an answer.
        NotTakenError: there is no way to send it to this peer.
        StateError: the file is gone.
    """
    if not found.is_established:
        raise LinkError("The peer ended the association.", cure="Look at the peer's log.")
    accepted = {(str(one.abstract_syntax), str(one.transfer_syntax[0])) for one in found.accepted_contexts}
    found.dimse_timeout = ANSWER_S + length / SLOWEST_BYTES_S
    copy: Path | None = None
    stored = path
    if kind not in accepted:
        plain = next((one for one in (EXPLICIT, IMPLICIT) if (kind[0], one) in accepted), None)
        if plain is None:
            raise NotTakenError(
                f"The peer takes no {_name(kind[0])}, neither as {_name(kind[1])} nor uncompressed.",
                cure="Allow the SOP class for our AE title at the peer, or leave these objects out by a rule.",
            )
        transcoding()
        path = copy = scratch / f"{message}-{secrets.token_hex(8)}.dcm"
        try:
            to_little_endian(stored, copy, implicit=plain == IMPLICIT)
        except PeerError as exc:
            raise NotTakenError(
                f"The peer does not take {_name(kind[1])}, and here it cannot be decoded: {exc.message}",
                cure=f"Allow {_name(kind[1])} for {_name(kind[0])} at the peer.",
            ) from exc
    try:
        status = found.send_c_store(path, msg_id=message, priority=_DICOM_PRIORITY[priority])
    except RuntimeError as exc:
        raise LinkError("The peer ended the association.", cure="Look at the peer's log.") from exc
    except (ValueError, AttributeError, TypeError, LookupError) as exc:  # the library cannot encode what it was given
        raise NotTakenError(f"The object cannot be sent: {type(exc).__name__}.", cure="Look at the object.") from exc
    finally:
        if copy is not None:
            copy.unlink(missing_ok=True)
    if "Status" not in status:
        raise LinkError("The peer did not answer a C-STORE.", cure="Look at the peer's log.")
    return int(status.Status)


def _name(uid: str) -> str:
    return UID(uid).name
