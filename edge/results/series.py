"""When a series is complete enough to answer, and whom it is about."""

from __future__ import annotations

from msgspec import Struct


class Rules(Struct, frozen=True):
    """Seconds after which a series is answered: without a new slice, and at the latest since its first one."""

    quiet_s: float
    hard_limit_s: float


def completeness(
    rules: Rules, *, now: float, pending_since: float, last_stored_at: float, unread: bool, delivered: bool
) -> str:
    """Returns why the series may be answered now, or nothing while it may not.

    Args:
        rules: the node's settings.
        now: seconds since 1970, as the two times that follow.
        pending_since: when the first slice that no answer counts was stored.
        last_stored_at: when the latest slice was stored.
        unread: stored slices still wait to be read.
        delivered: the association that brought the latest slice has ended and brought more than one.
    """
    if now - pending_since >= rules.hard_limit_s:
        return "hard limit"
    if unread:
        return ""
    if delivered:
        return "association ended"
    return "quiet time" if now - last_stored_at >= rules.quiet_s else ""
