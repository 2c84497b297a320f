"""The DICOM door alone, as a process of its own: what the attacks, the power cuts and the kills are done to.

python -m scripts.lab.door STATE [OPTIONS]     listens until killed and prints its port
python -m scripts.lab.door --many              reads folders, forks a door for each and prints `pid port`

The second form pays for the imports once: a thousand doors are killed by one measurement.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edge.intake import door as door_module
from edge.intake.door import Door
from edge.intake.peers import AllowList, Peer
from edge.intake.spool import Spool
from edge.intake.tls import Tls
from shared.clock import SystemClock
from shared.log import configure

START_S = 60.0


@dataclass(frozen=True)
class DoorProcess:
    """A door that runs somewhere: its process, its ports (0: none), and the folder it owns."""

    pid: int
    port: int
    tls_port: int
    state: Path

    def memory_mb(self, what: str = "VmHWM") -> float:
        """Returns a line of /proc/PID/status in MB: VmHWM is the most that was ever resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(f"{what}:"):
                return int(line.split()[1]) / 1024
        raise ValueError(what)

    def threads(self) -> set[int]:
        """Returns the identifiers of the process's threads."""
        return {int(path.name) for path in Path(f"/proc/{self.pid}/task").iterdir()}


def command(state: Path, *options: str) -> list[str]:
    """Returns the command line of a door."""
    return [sys.executable, "-m", "scripts.lab.door", str(state), *options]


@contextmanager
def door_process(state: Path, *options: str, before: Sequence[str] = ()) -> Iterator[DoorProcess]:
    """Runs a door until the block ends; `before` is put before its command (a tracer and its options)."""
    child = subprocess.Popen([*before, *command(state, *options)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        door = _read(child.stdout.fileno(), state)
        try:
            yield door
        finally:
            Doors.kill(door)
    finally:
        try:
            child.wait(10)  # a tracer ends with what it traces
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        child.stdout.close()


class Doors:
    """Starts doors in a wink; each is killed by its own pid."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "scripts.lab.door", "--many"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def start(self, state: Path) -> DoorProcess:
        """Starts a door on a folder, as it was left there."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(f"{state}\n".encode())
        self._parent.stdin.flush()
        return _read(self._parent.stdout.fileno(), state)

    @staticmethod
    def kill(door: DoorProcess) -> None:
        """SIGKILL, and a wait until it is gone; nothing happens to a door that is gone already."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(door.pid, signal.SIGKILL)
        end = time.monotonic() + START_S
        while alive(door):
            if time.monotonic() > end:
                raise TimeoutError("A killed door does not go.")
            time.sleep(0.002)

    def close(self) -> None:
        """Ends the parent; its doors were killed before."""
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.close()
        self._parent.wait(10)
        self._parent.stdout.close()


def alive(door: DoorProcess) -> bool:
    """Tells whether the process is there and no zombie."""
    try:
        stat = Path(f"/proc/{door.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def _read(source: int, state: Path) -> DoorProcess:
    """Reads the line that a started door prints."""
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([source], [], [], START_S)
        got = os.read(source, 1) if ready else b""
        if not got:
            raise RuntimeError("The door did not start.")
        line += got
    pid, port, tls_port = (int(word) for word in line.split())
    return DoorProcess(pid, port, tls_port, state)


def _serve(options: argparse.Namespace, said: int) -> None:
    door_module.ARTIM_S, door_module.IDLE_S = options.artim_s, options.idle_s
    state: Path = options.state
    spool = Spool(state / "spool", state / "intake.sqlite", limit_bytes=options.limit_bytes, clock=SystemClock())
    tls = Tls(*(options.tls / name for name in ("door.pem", "door.key", "ca.pem"))) if options.tls else None
    door = Door(
        spool,
        ae_title="RADFLEET",
        host="127.0.0.1",
        port=0,
        allow=AllowList([Peer(title, "127.0.0.1", associations=options.associations) for title in options.allow]),
        nudge=lambda: None,
        clock=SystemClock(),
        tls=tls,
    )
    door.start()
    os.write(said, f"{os.getpid()} {door.port} {door.tls_port}\n".encode())
    signal.pause()


def _many(options: argparse.Namespace, said: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    for line in sys.stdin:
        if os.fork() == 0:
            os.setsid()
            options.state = Path(line.strip())
            _serve(options, said)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path, nargs="?")
    parser.add_argument("--many", action="store_true")
    parser.add_argument("--artim-s", type=float, default=door_module.ARTIM_S)
    parser.add_argument("--idle-s", type=float, default=door_module.IDLE_S)
    parser.add_argument("--limit-bytes", type=int, default=2_000_000_000)
    parser.add_argument("--associations", type=int, default=112)
    parser.add_argument("--allow", action="append", default=None)
    parser.add_argument("--tls", type=Path)
    options = parser.parse_args()
    options.allow = options.allow or ["MODALITY"]
    said = os.dup(1)
    os.dup2(2, 1)  # nobody reads the pipe after the first line
    configure("door")
    if options.many:
        _many(options, said)
    else:
        _serve(options, said)


if __name__ == "__main__":
    main()
