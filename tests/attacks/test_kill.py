"""SIGKILL for the door between the first byte and the answer; what was acknowledged is there, once, and whole.

Thirty steps here, with one sender; every step, with one and with four: `scripts/bench kill`, docs/kill.json.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lab.bench_kill import stale
from scripts.lab.door import Doors
from scripts.lab.kill import SIDES, Step, choose, kept, kill_at, steps, write_sending
from tests.simulators.node import make_spool

SEEDS = 30


@pytest.fixture(scope="module")
def doors() -> Iterator[Doors]:
    one = Doors()
    yield one
    one.close()


@pytest.fixture(scope="module")
def every(doors: Doors, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    return steps(doors, tmp_path_factory.mktemp("steps"))


def test_the_steps_are_those_of_three_objects(every: list[Step]) -> None:
    names = [step.name for step in every]
    assert names.count("rename") == len(SIDES)
    assert names.count("fsync") == 2 * len(SIDES)
    assert names.index("recvfrom") < names.index("fsync") < names.index("rename")
    assert names.count("sendto") == len(SIDES) + 2  # the acceptance and the release too


@pytest.mark.parametrize("seed", range(SEEDS))
def test_attack_sigkill_at_a_system_call(doors: Doors, every: list[Step], tmp_path: Path, seed: int) -> None:
    step, _ = choose(every, seed)
    killed = kill_at(doors, tmp_path, step, [write_sending(tmp_path / "sending", 0)])
    assert killed.faults == ()


@pytest.mark.parametrize("name", ["fsync", "rename", "sendto", "pwrite64"])
def test_attack_sigkill_while_four_send(doors: Doors, every: list[Step], tmp_path: Path, name: str) -> None:
    found = [one for one in every if one.name == name]
    step = found[len(found) // 2]  # commits that four share write less than four times as often
    killed = kill_at(doors, tmp_path, step, [write_sending(tmp_path / f"{n}", n) for n in range(4)])
    assert killed.hit
    assert killed.faults == ()


def test_what_is_half_lost_or_double_is_seen(tmp_path: Path) -> None:
    sending = write_sending(tmp_path / "sending", 0)
    doors = Doors()
    try:
        killed = kill_at(doors, tmp_path, Step("sendto", 3), [sending])
    finally:
        doors.close()
    assert (killed.hit, killed.acknowledged) == (True, 1)
    state = tmp_path / "state"
    assert kept(state, sending.data) == dict.fromkeys(sending.data, 1)
    database = sqlite3.connect(state / "intake.sqlite")
    database.execute("DELETE FROM objects WHERE id = (SELECT MIN(id) FROM objects)")
    database.commit()
    database.close()
    assert len(kept(state, sending.data)) == len(SIDES) - 1
    make_spool(state).close()  # which heals it
    path = next((state / "spool").iterdir())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not whole"):
        kept(state, sending.data)


def test_a_result_that_is_older_than_the_code_is_named() -> None:
    assert stale({"intake": "abc", "faults": []}, "abc") == ""
    assert "abd now" in stale({"intake": "abc", "faults": []}, "abd")
    assert "1 faults" in stale({"intake": "abc", "faults": ["x"]}, "abc")
