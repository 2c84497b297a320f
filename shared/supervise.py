"""One command runs a side's processes: start, watch, restart with back-off, stop in order.

A child tells that it is ready by `announce`; the supervisor prints `READY <name> …` for it and, when all are, writes
`run/ready.json`. Children die with their supervisor even when it is SIGKILLed, so a restart finds its ports free.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from shared.errors import ConfigError
from shared.files import atomic_write
from shared.log import get_logger

POLL_S = 0.1
STOP_GRACE_S = 20.0  # a study in the pipeline is finished, then the process ends
BACKOFF_FIRST_S = 0.2
BACKOFF_CAP_S = 15.0
STEADY_S = 30.0  # a child that lived this long starts its back-off anew
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """One process to keep alive; with `wanted` it is started only when that says so, and may end by itself."""

    name: str
    command: Sequence[str]
    nice: int = 0
    wanted: Callable[[], bool] | None = None


@dataclass
class _Child:
    job: Job
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    failures: int = 0
    ready: bool = False
    facts: Mapping[str, object] = field(default_factory=dict)


class Supervisor:
    """Keeps `jobs` alive until `stop` is set, then ends them in reverse order."""

    def __init__(self, jobs: Sequence[Job], run_folder: Path, *, announced: Callable[[str], None]) -> None:
        self._children = [_Child(job) for job in jobs]
        self._run = run_folder
        self._announced = announced
        self._all_ready = False
        self._log = get_logger()

    def run(self, stop: threading.Event) -> None:
        """Blocks until `stop`; returns after every child has ended."""
        self._run.mkdir(parents=True, exist_ok=True)
        for stale in [self._run / "ready.json", *(self._run / f"{c.job.name}.json" for c in self._children)]:
            stale.unlink(missing_ok=True)
        try:
            while not stop.is_set():
                for child in self._children:
                    self._watch(child, time.monotonic())
                self._tell()
                stop.wait(POLL_S)
        finally:
            self._end()

    def _watch(self, child: _Child, now: float) -> None:
        if child.process is None:
            if now >= child.due and (child.job.wanted is None or child.job.wanted()):
                self._start(child, now)
            return
        code = child.process.poll()
        if code is None:
            return
        child.process, child.ready = None, False
        if code == 0 and child.job.wanted:
            child.failures, child.due = 0, now + BACKOFF_FIRST_S
            return
        child.failures = 1 if now - child.started > STEADY_S else child.failures + 1
        wait = min(BACKOFF_FIRST_S * 2 ** (child.failures - 1), BACKOFF_CAP_S)
        child.due = now + wait
        self._log.warning("supervise.ended", child=child.job.name, code=code, restart_in_s=wait)

    def _start(self, child: _Child, now: float) -> None:
        (self._run / f"{child.job.name}.json").unlink(missing_ok=True)
        child.process = subprocess.Popen(
            child.job.command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the supervisor only, which then stops us in order
            preexec_fn=_die_with(os.getpid(), child.job.nice),  # noqa: PLW1509  the supervisor has one thread
        )
        child.started = now

    def _tell(self) -> None:
        for child in self._children:
            if child.process is None or child.ready:
                continue
            facts = read_facts(self._run / f"{child.job.name}.json")
            if facts.get("pid") == child.process.pid:
                child.ready, child.facts = True, facts
                words = " ".join(f"{key}={value}" for key, value in facts.items())
                self._announced(f"READY {child.job.name} {words}")
        steady = [child for child in self._children if not child.job.wanted]
        if not self._all_ready and all(child.ready for child in steady):
            self._all_ready = True
            facts_by_name = {child.job.name: child.facts for child in steady}
            atomic_write(self._run / "ready.json", json.dumps(facts_by_name, indent=2).encode())
            self._announced("READY all")

    def _end(self) -> None:
        running = [child for child in reversed(self._children) if child.process is not None]
        for child in running:
            if child.process is not None:
                child.process.terminate()
        end = time.monotonic() + STOP_GRACE_S
        for child in running:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._log.warning("supervise.killed", child=child.job.name)
                child.process.kill()
                child.process.wait()
        (self._run / "ready.json").unlink(missing_ok=True)


def announce(run_folder: Path, name: str, **facts: object) -> None:
    """Tells the supervisor, and whoever reads `run/<name>.json`, that this process is ready."""
    atomic_write(run_folder / f"{name}.json", json.dumps({"pid": os.getpid(), **facts}).encode())


def read_facts(path: Path) -> dict[str, object]:
    """Returns what a process announced; empty when it has not."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (OSError, msgspec.MsgspecError):
        return {}


def stop_on_signals() -> threading.Event:
    """Returns an event that SIGTERM and SIGINT set; call it in the main thread."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def fix_ports(path: Path, wanted: Mapping[str, tuple[str, int]]) -> dict[str, int]:
    """Returns a port for every name in `wanted` (host, port), and writes them to `path` as JSON.

    A port 0 becomes a free one, and the same one again after a restart, because modalities and nodes remember it.
    """
    before = read_facts(path)
    ports: dict[str, int] = {}
    for name, (host, port) in wanted.items():
        old = before.get(name)
        ports[name] = port or (old if isinstance(old, int) else _free_port(host))
    if ports != before:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(ports).encode())
    return ports


def _free_port(host: str) -> int:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as exc:
        raise ConfigError(f"Nothing can listen on {host}: {exc}.", cure="Correct the host.") from exc


def _die_with(parent: int, nice: int) -> Callable[[], None]:
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)
        os.nice(nice)

    return prepare


def python_module(module: str, *arguments: str) -> list[str]:
    """Returns the command that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", module, *arguments]
