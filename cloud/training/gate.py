"""May this candidate leave the building? A pure function of what hospitals and the reference set measured.

A candidate passes when it is proven better somewhere and plausibly worse nowhere, when its eight-bit form
answers like its full-precision form, and when there were cases enough to say so. Too few cases is
`insufficient`, which is not a weak pass: it never rolls out by itself. A gate that saw phantoms only says
`weak`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal

from msgspec import Struct

from shared.wire.records import HeadJudgement

Decision = Literal["pass", "fail", "insufficient"]


class ReferenceHead(Struct, frozen=True):
    """One head on the reference set: the eight-bit forms of champion and candidate, the candidate's fp32."""

    head: str
    per_class: list[int]
    auc_champion: float
    auc_candidate: float
    auc_candidate_fp32: float
    flipped: float  # share of answers that eight bits change
    drop_low: float  # lower end of the 95 % paired interval of what eight bits cost in AUC


class Bars(Struct, frozen=True):
    """What the gate asks for; every bar stands in the verdict."""

    min_per_class: int = 5  # held-out cases, in at least two classes of a head, for a hospital's word to count
    min_sites: int = 1  # hospitals with enough cases
    error_rate: float = 0.05  # of calling a candidate better by chance, one-sided, over all comparisons together
    harm: float = 0.05  # AUC; a hospital may not lose more than this, or be plausibly worse by twice this
    reference_drop: float = 0.02  # AUC lost on the reference set
    parity_drop: float = 0.005  # AUC lost to eight bits, where chance does not explain it
    parity_limit: float = 0.02  # AUC lost to eight bits, whatever explains it
    parity_flipped: float = 0.08  # answers changed by eight bits


class Verdict(Struct, frozen=True):
    """The gate's record; its canonical JSON is what the registry signs for."""

    champion: str
    candidate: str
    decision: Decision
    strength: Literal["full", "weak"]
    reasons: list[str]
    bars: Bars


def judge(
    champion: str,
    candidate: str,
    sites: Mapping[str, Sequence[HeadJudgement]],
    reference: Sequence[ReferenceHead],
    bars: Bars,
) -> Verdict:
    """Returns the verdict on `candidate`, both packages named by digest.

    Args:
        champion: what hospitals run now.
        candidate: what is judged.
        sites: each hospital's paired comparison on its own held-out cases.
        reference: the cloud's comparison on the reference set, one entry a head.
        bars: the limits.
    """
    counted = {(site, row.head): row for site, rows in sites.items() for row in rows if _enough(row.per_class, bars)}
    everything = [row for rows in sites.values() for row in rows]
    strength: Literal["full", "weak"] = "full" if any(not row.phantom for row in counted.values()) else "weak"
    against = [*_broken(everything, reference), *_reference(reference, bars), *_harm(counted, bars)]
    better = _better(counted, bars)
    decision: Decision
    if against:
        decision, reasons = "fail", against
    elif len({site for site, _ in counted}) < bars.min_sites:
        decision = "insufficient"
        reasons = [f"fewer than {bars.min_sites} hospitals hold {bars.min_per_class} cases in two classes"]
    elif not better:
        decision, reasons = "fail", ["no hospital is proven better than before"]
    else:
        decision, reasons = "pass", better
    return Verdict(champion, candidate, decision, strength, reasons, bars)


def _enough(per_class: Sequence[int], bars: Bars) -> bool:
    return sum(n >= bars.min_per_class for n in per_class) >= 2


def _broken(rows: Sequence[HeadJudgement], reference: Sequence[ReferenceHead]) -> list[str]:
    """A number that is no number, or no reference at all: the candidate or its judge is degenerate."""
    values = [
        v
        for row in rows
        for v in (
            row.auc_champion, row.auc_candidate, row.auc_difference_low, row.auc_difference_high,
            row.balanced_champion, row.balanced_candidate, row.flipped,
        )
    ]  # fmt: skip
    values += [
        v for r in reference for v in (r.auc_champion, r.auc_candidate, r.auc_candidate_fp32, r.flipped, r.drop_low)
    ]
    faults = (
        [] if all(math.isfinite(v) and -1 <= v <= 1 for v in values) else ["a measurement is not a number in range"]
    )
    if any(row.auc_difference_low > row.auc_difference_high for row in rows):
        faults.append("an interval is upside down")
    return faults if reference else [*faults, "there is no comparison on the reference set"]


def _reference(reference: Sequence[ReferenceHead], bars: Bars) -> list[str]:
    faults = []
    for row in reference:
        lost = row.auc_champion - row.auc_candidate
        if lost > bars.reference_drop:
            faults.append(f"reference set, {row.head}: AUC {lost:.3f} lower than the champion's")
        dropped = row.auc_candidate_fp32 - row.auc_candidate
        proven = dropped > bars.parity_drop and row.drop_low > 0
        if proven or dropped > bars.parity_limit or row.flipped > bars.parity_flipped:
            faults.append(f"eight bits, {row.head}: AUC {dropped:.4f} lower, {row.flipped:.3f} of answers flipped")
    return faults


def _harm(counted: Mapping[tuple[str, str], HeadJudgement], bars: Bars) -> list[str]:
    faults = []
    for (site, head), row in sorted(counted.items()):
        change = row.auc_candidate - row.auc_champion
        if change < -bars.harm or row.auc_difference_low < -2 * bars.harm:
            faults.append(
                f"{site}, {head}: AUC changes by {change:+.3f} "
                f"({row.auc_difference_low:+.3f} to {row.auc_difference_high:+.3f})"
            )
    return faults


def _better(counted: Mapping[tuple[str, str], HeadJudgement], bars: Bars) -> list[str]:
    """Hospitals whose gain stands after correcting for the number of comparisons (Bonferroni).

    A node sends a 95 % interval; its width gives the standard error that the wider, corrected interval needs.
    """
    if not counted:
        return []
    wanted = NormalDist().inv_cdf(1 - bars.error_rate / len(counted))
    proven = []
    for (site, head), row in sorted(counted.items()):
        change = row.auc_candidate - row.auc_champion
        error = (row.auc_difference_high - row.auc_difference_low) / (2 * NormalDist().inv_cdf(0.975))
        if row.auc_difference_low > 0 and change > wanted * error and row.balanced_candidate >= row.balanced_champion:
            proven.append(
                f"{site}, {head}: AUC {row.auc_champion:.3f} to {row.auc_candidate:.3f} "
                f"({row.auc_difference_low:+.3f} to {row.auc_difference_high:+.3f})"
            )
    return proven
