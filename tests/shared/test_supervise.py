"""The supervisor with real child processes: ready, killed, stopped, on demand, and its own sudden death."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from scripts.lab.child import listens, wait_until
from shared.supervise import Job, Supervisor, fix_ports, read_facts

CHILD = """
import sys, threading, time
from pathlib import Path
from shared.supervise import announce, stop_on_signals
folder, name = Path(sys.argv[1]), sys.argv[2]
stop = stop_on_signals()
announce(folder, name, answer=42)
if name == "failing":
    sys.exit(3)
if name == "worker":
    (folder / "wanted").unlink()
    sys.exit(0)
if name == "deaf":
    while True: time.sleep(1)
stop.wait()
(folder / f"{name}.stopped").touch()
"""
PARENT = """
import sys, threading
from pathlib import Path
from shared.supervise import Job, Supervisor
child = [sys.executable, "-c", sys.argv[2], sys.argv[1], "steady"]
Supervisor([Job("steady", child)], Path(sys.argv[1]), announced=print).run(threading.Event())
"""


class Running:
    """A supervisor in a thread of this process."""

    def __init__(self, folder: Path, *names: str, wanted: bool = False) -> None:
        self.folder, self.lines, self._stop = folder, [], threading.Event()  # type: ignore[var-annotated]
        jobs = [Job(name, [sys.executable, "-c", CHILD, str(folder), name]) for name in names]
        if wanted:
            command = [sys.executable, "-c", CHILD, str(folder), "worker"]
            jobs.append(Job("worker", command, nice=5, wanted=(folder / "wanted").exists))
        supervisor = Supervisor(jobs, folder, announced=self.lines.append)
        self._thread = threading.Thread(target=supervisor.run, args=(self._stop,))
        self._thread.start()

    def pid(self, name: str) -> int:
        return int(str(read_facts(self.folder / f"{name}.json").get("pid", 0)))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(40)
        assert not self._thread.is_alive()


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_it_says_when_all_are_ready_and_stops_them_in_order(folder: Path) -> None:
    running = Running(folder, "first", "second")
    wait_until("all to be ready", (folder / "ready.json").exists)
    facts = json.loads((folder / "ready.json").read_text())
    assert {name: one["answer"] for name, one in facts.items()} == {"first": 42, "second": 42}
    wait_until("the line", lambda: "READY all" in running.lines)
    pids = [running.pid(name) for name in ("first", "second")]
    running.stop()
    assert (folder / "first.stopped").exists()
    assert (folder / "second.stopped").exists()
    assert not any(alive(pid) for pid in pids)
    assert not (folder / "ready.json").exists()


def test_a_killed_process_comes_back(folder: Path) -> None:
    running = Running(folder, "steady")
    wait_until("it to be ready", lambda: "READY all" in running.lines)
    before = running.pid("steady")
    os.kill(before, signal.SIGKILL)
    wait_until("it to come back", lambda: sum(line.startswith("READY steady") for line in running.lines) == 2)
    assert running.pid("steady") not in (0, before)
    running.stop()


def test_a_process_that_fails_at_once_is_started_less_and_less_often(folder: Path) -> None:
    running = Running(folder, "failing")
    seen: set[int] = set()

    def three() -> bool:
        seen.add(running.pid("failing"))
        return len(seen - {0}) >= 3

    wait_until("three starts", three)
    running.stop()
    assert len(seen) < 20


def test_a_process_on_demand_runs_when_there_is_work_and_only_then(folder: Path) -> None:
    running = Running(folder, "steady", wanted=True)
    wait_until("all to be ready", (folder / "ready.json").exists)  # which does not wait for the one on demand
    assert running.pid("worker") == 0
    for _ in range(2):
        (folder / "wanted").touch()
        wait_until("the work to be done", lambda: not (folder / "wanted").exists())
    running.stop()


def test_children_die_with_a_supervisor_that_is_killed(folder: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(folder), CHILD]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])
    wait_until("the child", lambda: bool(read_facts(folder / "steady.json")))
    child = int(str(read_facts(folder / "steady.json")["pid"]))
    assert alive(child)
    parent.kill()
    parent.wait()
    wait_until("the child to end", lambda: not alive(child))


def test_a_port_that_was_chosen_is_chosen_again(folder: Path) -> None:
    path = folder / "run" / "ports.json"
    first = fix_ports(path, {"dicom": ("127.0.0.1", 0), "web": ("127.0.0.1", 8080)})
    assert first["web"] == 8080
    assert not listens(first["dicom"])
    assert fix_ports(path, {"dicom": ("127.0.0.1", 0), "web": ("127.0.0.1", 8081)}) == {**first, "web": 8081}
    assert json.loads(path.read_text())["dicom"] == first["dicom"]
