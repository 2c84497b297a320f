"""The configured rules, applied: what the pipeline, the forward process and `whatif` ask about one object."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Protocol

from msgspec.structs import replace
from pydicom.dataset import Dataset

from edge.forward.facts import facts_of
from edge.forward.queue import is_prior
from edge.forward.rules import Decision, Facts, Rule, decide, without_sender
from edge.sqlite import open_foreign


class Arrived(Protocol):
    """What is known of an object besides its data set."""

    @property
    def calling_ae(self) -> str: ...
    @property
    def called_ae(self) -> str: ...
    @property
    def sop_class(self) -> str: ...
    @property
    def study(self) -> str: ...


class Routes:
    """Decides by the configured rules.

    `titles` are the destinations' AE titles by name: an object is not sent back to whom it came from. `prior` tells
    whether a study was fetched as a prior.
    """

    def __init__(self, rules: Sequence[Rule], titles: Mapping[str, str], prior: Callable[[str], bool]) -> None:
        self.rules = tuple(rules)
        self._titles = titles
        self._prior = prior

    def facts(self, dataset: Dataset, arrived: Arrived) -> Facts:
        """Returns what the rules look at."""
        facts = facts_of(
            dataset, calling_ae=arrived.calling_ae, called_ae=arrived.called_ae, sop_class=arrived.sop_class
        )
        return replace(facts, prior=self._prior(arrived.study))

    def decide(self, facts: Facts) -> Decision:
        """Returns what happens to an object with these facts."""
        return without_sender(decide(self.rules, facts), facts.calling_ae, self._titles)

    def __call__(self, dataset: Dataset, arrived: Arrived) -> Decision:
        """Returns what happens to an object."""
        return self.decide(self.facts(dataset, arrived))


class Priors:
    """Reads in forward.sqlite, which another process owns, whether a study was fetched as a prior."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: Connection | None = None

    def __call__(self, study: str) -> bool:
        """Tells whether the study was fetched as a prior lately."""
        if self._db is None:
            self._db = open_foreign(self._path)
        if self._db is None:
            return False
        rows = self._db.execute("SELECT at FROM priors WHERE study = ?", (study,)).fetchall()
        return is_prior(rows, time.time())
