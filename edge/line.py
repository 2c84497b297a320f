"""The line before the models: claimed objects that are read ahead, a few at a time and the urgent ones first.

The spool is the queue, on disk and bounded there (a full one is refused at the door with 0xA700 and shown); the line
holds LENGTH of its objects. An object that arrives alone is read at once; one that is urgent waits for those only that
are in the line already.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from edge.forward.rules import OUTCOME, Decision
from edge.imaging.ahead import Ahead
from edge.imaging.reading import Parts
from edge.imaging.urgency import says_urgent
from edge.inference.engine import Engine
from edge.results.compose import Serving
from edge.results.store import MAX_TRIES, Claimed, Store
from shared.errors import PeerError, StateError
from shared.package.manifest import Manifest

LENGTH = 8
_LOOK = 64  # objects behind the line that are looked at in one go
_STUDIES = 512  # whose urgency is remembered


class Serves(Protocol):
    """Who decides which model answers (edge.slots.swap.Swapper)."""

    def serving(self) -> tuple[Engine, Manifest, str]:
        """Returns the engine, its manifest and the package's digest."""


class Coming(Struct, frozen=True, eq=False):
    """One object of the line: read for the package that served when it was begun, or kept from it by a rule."""

    claimed: Claimed
    serving: Serving
    parts: Future[Parts]
    outcome: str = ""  # what a rule made of it; it is not read then


class Line:
    """See the module's docstring; one thread uses it."""

    def __init__(
        self,
        store: Store,
        spool: Path,
        models: Serves,
        ahead: Ahead,
        routes: Callable[[Path, Claimed], Decision] | None,
    ) -> None:
        """Takes where objects are claimed, lie, are read for whom and by whom; `routes` as in `edge.pipeline`."""
        self._store = store
        self._spool = spool
        self._models = models
        self._ahead = ahead
        self._routes = routes
        self._coming: list[Coming] = []
        self._urgent: list[tuple[int, Claimed]] = []  # behind the line, by intake's row id
        self._known: OrderedDict[str, bool] = OrderedDict()  # study: urgent

    def take(self, now: float) -> list[Coming]:
        """Returns what has been read of the line, waiting for the first; empty when there is nothing to read.

        In the order of arrival, but what is ready does not wait for what is not, unless both are the same instance.
        """
        self._fill(now)
        self._begin_again()
        while self._coming:
            ready = [one for index, one in enumerate(self._coming) if one.parts.done() and not self._follows(index)]
            if ready:
                self._coming = [one for one in self._coming if one not in ready]
                return ready
            # Never empty: the first of the line follows nobody.
            wait([one.parts for one in self._coming if not one.parts.done()], return_when=FIRST_COMPLETED)
        return []

    def _fill(self, now: float) -> None:
        while len(self._coming) < LENGTH:
            if self._coming and self._coming[-1].claimed.tries > 1:
                return  # it may have ended the process: nobody else is to be there when it does so again
            claimed, urgent = self._next(now)
            if claimed is None:
                return
            coming = self._begin(claimed, urgent=urgent)
            if urgent:
                self._coming.insert(0, coming)
            else:
                self._coming.append(coming)

    def _next(self, now: float) -> tuple[Claimed | None, bool]:
        if (
            not self._store.leased and len(self._urgent) < _LOOK
        ):  # a few are leased at once; before the next few, somebody else may go first
            self._look()
        while self._urgent:
            claimed = self._store.claim_this(*self._urgent.pop(0), now)
            if claimed:
                return claimed, True
        return self._store.claim(now), False

    def _look(self) -> None:
        """Looks for what is urgent among the objects behind the line; when they are few they are read soon enough."""
        behind = self._store.not_looked_at(LENGTH, _LOOK)
        # What came twice with other bytes keeps its order: the older one must not become the newest answer, nor stand
        # in the line, with its reader, behind one that the same reader is to read.
        self._urgent += [(number, one) for number, one in behind if not one.conflict and self._is_urgent(one)]

    def _is_urgent(self, one: Claimed) -> bool:
        if one.study not in self._known:
            path = self._spool / one.file
            try:
                decision = self._routes(path, one) if self._routes else None
                said = decision.priority == "high" if decision and decision.read else False
                self._known[one.study] = said or says_urgent(path, one.offset, one.transfer_syntax)
            except StateError:  # it is gone: reading it will tell
                return False
            if len(self._known) > _STUDIES:
                self._known.popitem(last=False)
        return self._known[one.study]

    def _begin(self, claimed: Claimed, *, urgent: bool) -> Coming:
        serving = Serving(*self._models.serving())
        path = self._spool / claimed.file
        told: Future[Parts] = Future()
        if claimed.tries > MAX_TRIES:
            told.set_exception(PeerError(f"Reading this object ended the process {MAX_TRIES} times."))
        elif claimed.fault:
            told.set_exception(PeerError(f"The data set cannot be walked: {claimed.fault}."))
        else:
            decision = self._routes(path, claimed) if self._routes else None
            if decision is None or decision.read:
                return Coming(claimed, serving, self._ahead.begin(path, serving.manifest.heads, urgent=urgent))
            told.cancel()
            return Coming(claimed, serving, told, f"{OUTCOME}{decision.action}")
        return Coming(claimed, serving, told)

    def _begin_again(self) -> None:
        """What was begun for a package that serves no more is read for the one that does."""
        serving = Serving(*self._models.serving())
        for index, one in enumerate(self._coming):
            if one.serving.digest != serving.digest and not one.outcome:
                one.parts.add_done_callback(_drop)
                self._coming[index] = self._begin(one.claimed, urgent=False)
            elif one.serving.engine is not serving.engine:
                self._coming[index] = replace(one, serving=serving)

    def _follows(self, index: int) -> bool:
        """Tells whether an earlier one of the line is the same instance."""
        uid = self._coming[index].claimed.sop_instance
        return any(one.claimed.sop_instance == uid for one in self._coming[:index])


def _drop(parts: Future[Parts]) -> None:
    """Ends a reading that nobody waits for."""
    if not parts.cancelled() and not parts.exception():
        close = getattr(parts.result()[1], "close", None)
        if close:
            close()
