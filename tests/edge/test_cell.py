"""A decoder that crashes, hangs or swells takes its child with it and nothing else."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edge.imaging.cell import Cell, Limits
from scripts.lab.child import wait_until
from shared.errors import PeerError, StateError
from tests.simulators.decoders import work

LIMITS = Limits(cpu_s=1, wall_s=8.0, memory_bytes=400_000_000, reply_bytes=1_000_000)


@pytest.fixture(scope="module")
def cell() -> Iterator[Cell]:
    made = Cell(work, LIMITS)
    yield made
    made.close()


def ask(cell: Cell, request: str) -> list[bytes]:
    return list(cell.ask(request.encode()))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        ("crash", "ended the decoding process 2 times (SIGSEGV)"),
        ("exit", "ended the decoding process 2 times (code 3)"),
        ("flood", "ended the decoding process 2 times (gave no answer)"),
        ("sleep", "took more than 8 seconds"),
    ],
)
def test_attack_what_kills_a_decoder_is_said_and_the_next_object_is_read(
    cell: Cell, request_: str, reason: str
) -> None:
    with pytest.raises(PeerError) as refused:
        ask(cell, request_)
    assert reason in refused.value.message
    assert ask(cell, "fine") == [b"begun", b"done"]


def test_a_cell_whose_child_did_not_start_starts_another(tmp_path: Path) -> None:
    made = Cell(work, LIMITS)
    try:
        made._child[0].kill()
        made._child[0].join()
        with suppress(StateError):  # what it had said before it died is taken, or not
            ask(made, "fine")
        assert ask(made, "fine") == [b"begun", b"done"]
    finally:
        made.close()


def test_attack_a_decoder_that_never_ends_is_ended_once_and_not_tried_again(cell: Cell, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(PeerError, match="more than 1 seconds of processor time"):
        ask(cell, f"spin {tmp_path / 'runs'}")
    assert (tmp_path / "runs").read_text() == "x"
    assert time.monotonic() - began < LIMITS.wall_s
    assert ask(cell, "fine") == [b"begun", b"done"]


def test_attack_a_decoder_that_swells_is_tried_in_a_fresh_child_and_given_up(cell: Cell, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="more memory than one object may"):
        ask(cell, f"swell {tmp_path / 'runs'}")
    assert (tmp_path / "runs").read_text() == "xx"
    assert ask(cell, "fine") == [b"begun", b"done"]


def test_one_death_is_not_held_against_an_object_and_no_answer_comes_twice(cell: Cell, tmp_path: Path) -> None:
    assert ask(cell, f"once {tmp_path / 'died'}") == [b"begun", b"done"]
    assert (tmp_path / "died").exists()


def test_errors_cross_as_what_they_are_and_quote_nothing(cell: Cell) -> None:
    pid = cell.pid
    with pytest.raises(PeerError, match="not to our taste"):
        ask(cell, "peer")
    with pytest.raises(StateError, match="disk is gone"):
        ask(cell, "state")
    with pytest.raises(PeerError, match="Reading failed with IndexError") as refused:
        ask(cell, "defect")
    assert "DOE" not in refused.value.message
    assert ask(cell, "fine") == [b"begun", b"done"]
    assert cell.pid == pid


def test_who_wants_no_more_ends_the_work(cell: Cell) -> None:
    replies = cell.ask(b"sleep")
    assert next(replies) == b"begun"
    replies.close()  # type: ignore[attr-defined]
    assert ask(cell, "fine") == [b"begun", b"done"]


def test_a_child_that_died_in_between_is_replaced(cell: Cell) -> None:
    os.kill(cell.pid, signal.SIGKILL)
    assert ask(cell, "fine") == [b"begun", b"done"]


def test_the_child_leaves_no_core_file_and_goes_first_when_memory_is_short(cell: Cell) -> None:
    ask(cell, "fine")
    assert resource.prlimit(cell.pid, resource.RLIMIT_CORE) == (0, 0)
    assert int(Path(f"/proc/{cell.pid}/oom_score_adj").read_text()) > int(Path("/proc/self/oom_score_adj").read_text())


def test_the_child_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import time\nfrom edge.imaging.cell import Cell\nfrom tests.simulators.decoders import work\n"
        "if __name__ == '__main__':\n cell = Cell(work)\n list(cell.ask(b'fine'))\n"
        " print(cell.pid, flush=True)\n time.sleep(600)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        wait_until("the child to end", lambda: not Path(f"/proc/{pid}").exists(), seconds=20)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
