"""Which objects are analysed, sent on, both, only kept, or left alone: a pure function of rules and a data set's head.

The first rule whose conditions all hold decides; without one an object is analysed. The pipeline, the forward process
and `radfleet-edge whatif` ask the same function, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

Action = Literal["analyse", "forward", "both", "keep", "ignore"]
Priority = Literal["high", "normal", "low"]

CONDITIONS = (
    "modality",
    "calling_ae",
    "called_ae",
    "sop_class",
    "body_part",
    "study_description",
    "series_description",
)
READ: frozenset[Action] = frozenset({"analyse", "both"})  # these go to the models
SENT: frozenset[Action] = frozenset({"forward", "both"})  # these need destinations
OUTCOME = "rule:"  # before the action: what results.sqlite calls an object that a rule kept from the models


class Facts(Struct, frozen=True):
    """What a rule may look at, empty where the data set does not say it."""

    modality: str = ""
    calling_ae: str = ""
    called_ae: str = ""
    sop_class: str = ""
    body_part: str = ""
    study_description: str = ""
    series_description: str = ""
    ours: bool = False  # made by this software: a report or picture that came back
    prior: bool = False  # fetched by this node as a prior


class Rule(Struct, frozen=True):
    """Conditions and what follows; a condition is a tuple of shell patterns, empty holds for everything."""

    name: str
    action: Action
    destinations: tuple[str, ...] = ()
    priority: Priority = "normal"
    modality: tuple[str, ...] = ()
    calling_ae: tuple[str, ...] = ()
    called_ae: tuple[str, ...] = ()
    sop_class: tuple[str, ...] = ()  # a UID or its keyword, as in CTImageStorage
    body_part: tuple[str, ...] = ()
    study_description: tuple[str, ...] = ()
    series_description: tuple[str, ...] = ()


class Decision(Struct, frozen=True):
    """What happens to one object; `why` is shown as it stands and never quotes the data set."""

    action: Action
    destinations: tuple[str, ...]
    priority: Priority
    why: str

    @property
    def read(self) -> bool:
        """Whether the models read the object."""
        return self.action in READ


def decide(rules: Sequence[Rule], facts: Facts) -> Decision:
    """Returns what happens to an object with these facts."""
    if facts.ours:
        return Decision("ignore", (), "normal", "this software made it: results that come back go nowhere")
    if facts.prior:
        return Decision("keep", (), "normal", "this node fetched it as a prior")
    for rule in rules:
        if not failing(rule, facts):
            held = [name for name in CONDITIONS if getattr(rule, name)]
            why = f"{rule.name}: {', '.join(held)} match" if held else f"{rule.name}: it has no condition"
            return Decision(rule.action, rule.destinations, rule.priority, why)
    return Decision("analyse", (), "normal", "no rule matches" if rules else "there are no rules")


def possible(rules: Sequence[Rule], facts: Facts) -> tuple[Rule, ...]:
    """Returns the rules of which one may decide, where the empty ones of these facts are unknown.

    Without an unknown fact that matters, that is the rule that `decide` finds, or none.
    """
    found = []
    for rule in rules:
        failed = [name for name in CONDITIONS if not matches(getattr(rule, name), *_values(facts, name))]
        if all(not getattr(facts, name) for name in failed):
            found.append(rule)
            if not failed:
                break
    return tuple(found)


def failing(rule: Rule, facts: Facts) -> str:
    """Returns the name of the first condition of a rule that does not hold; empty when all do."""
    return next((name for name in CONDITIONS if not matches(getattr(rule, name), *_values(facts, name))), "")


def matches(patterns: Sequence[str], *values: str) -> bool:
    """Tells whether one of the values matches one of the shell patterns, whatever the case; no pattern matches all."""
    folded = [value.strip().casefold() for value in values]
    return not patterns or any(fnmatchcase(value, pattern.casefold()) for pattern in patterns for value in folded)


def without_sender(decision: Decision, calling_ae: str, titles: Mapping[str, str]) -> Decision:
    """Returns the decision without the destinations that the object came from; `titles` are AE titles by name."""
    back = [name for name in decision.destinations if titles.get(name) == calling_ae]
    if not back:
        return decision
    kept = tuple(name for name in decision.destinations if name not in back)
    return replace(
        decision, destinations=kept, why=f"{decision.why}; not back to {', '.join(back)}, it came from there"
    )


def _values(facts: Facts, condition: str) -> tuple[str, ...]:
    value = getattr(facts, condition)
    if condition != "sop_class":
        return (value,)
    from pydicom.uid import UID  # late: the configuration imports this module, and not every process reads DICOM

    return (value, UID(value).keyword)
