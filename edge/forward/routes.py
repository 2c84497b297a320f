"""The configured rules, applied: what the pipeline, the forward process and `whatif` ask about one object."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from sqlite3 import Connection
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace
from pydicom.dataset import Dataset

from edge.forward.facts import facts_of, read_facts_head
from edge.forward.queue import is_prior
from edge.forward.rules import Decision, Facts, Rule, decide, failing, possible, without_sender
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


class Stored(Arrived, Protocol):
    """What intake's index tells of an object."""

    @property
    def modality(self) -> str: ...
    @property
    def offset(self) -> int: ...
    @property
    def transfer_syntax(self) -> str: ...


class Told(Struct, frozen=True):
    """What is known of a stored object, why not all of it (empty when it is), and what follows."""

    facts: Facts
    fault: str
    decision: Decision
    possible: tuple[Rule, ...]  # of which one may decide, with a fault

    @property
    def uncertain(self) -> bool:
        """Whether the decision depends on what is not known."""
        return bool(self.fault) and any(failing(rule, self.facts) for rule in self.possible)


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

    def told(self, path: Path, stored: Stored) -> Told:
        """Returns what happens to a stored object, by the beginning of its file and by intake's index.

        Raises:
            StateError: the file is gone or the disk fails.
        """
        head = read_facts_head(path, stored.offset, stored.transfer_syntax)
        return self._told(head.dataset, head.fault, stored)

    def untold(self, stored: Stored, fault: str) -> Told:
        """As `told`, of an object that is not to be had: intake's index alone tells."""
        return self._told(Dataset(), fault, stored)

    def _told(self, head: Dataset, fault: str, stored: Stored) -> Told:
        facts = self.facts(head, stored)
        facts = replace(facts, modality=facts.modality or stored.modality)
        told = () if facts.ours or facts.prior else possible(self.rules, facts)
        return Told(facts, fault, self.decide(facts), told)

    def of_rule(self, rule: Rule, calling_ae: str) -> Decision:
        """Returns what a rule would do to an object of that sender."""
        found = Decision(rule.action, rule.destinations, rule.priority, rule.name)
        return without_sender(found, calling_ae, self._titles)

    def __call__(self, path: Path, stored: Stored) -> Decision:
        """Returns what happens to a stored object; see `told`."""
        return self.told(path, stored).decision


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
