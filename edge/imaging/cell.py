"""A child process in which bytes of strangers are parsed and decoded: it may die, hang or swell, nothing else does.

Decoders are C code that parses what anybody sent. A crash takes the child, memory and time end at limits that the
kernel holds, and what comes back is bytes that are checked as any input is: never pickled.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import resource
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import msgspec
from msgspec import Struct

from shared.errors import PeerError, StateError
from shared.log import get_logger

Work = Callable[[bytes], Iterator[bytes]]

_TRIES = 2
_NO_MEMORY = 71  # exit code of a child that was refused memory
_OOM_SCORE = "500"  # the kernel, when it must end somebody, ends the child and not the node
_READY = b"ready"
_START_S = 60.0
_JOIN_S = 5.0
_DYING_S = 1.0  # until the kernel tells how it died


class Limits(Struct, frozen=True):
    """What a child may take."""

    cpu_s: int = 20  # of processor time between two answers
    wall_s: float = 120.0  # between two answers, on however busy a machine
    memory_bytes: int = 3 * 1024**3  # of data; files that it maps do not count
    reply_bytes: int = 64 * 1024**2  # of one answer


class Cell:
    """One child that does `work`, request by request; a dead one is replaced.

    The child ends when its parent does, also when that is killed: at the latest when it has finished its request.
    """

    def __init__(self, work: Work, limits: Limits | None = None) -> None:
        """Starts the child; `work` is a function of a module, so that the child can import it."""
        self._work = work
        self._limits = limits or Limits()
        self._busy = threading.Lock()
        self._proven = False  # whether the child has said that it is ready
        self._child = self._start()

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._child[0].pid or 0

    def ask(self, request: bytes) -> Iterator[bytes]:
        """Yields what `work` yields for a request; one at a time, others wait.

        Raises:
            PeerError: `work` raised it, or failed, or ran beyond its time, or ended two children.
            StateError: `work` raised it, or there can be no child.
        """
        with self._busy:
            given = 0
            for trial in range(1, _TRIES + 1):
                try:
                    for index, data in enumerate(self._once(request)):
                        if index == given:  # the second child repeats what the first one gave
                            given += 1
                            yield data
                    return
                except _DiedError as exc:
                    get_logger().warning("imaging.child_died", reason=exc.message, trial=trial)
                    if trial == _TRIES or exc.hopeless:
                        raise PeerError(f"Reading the object {exc.message}.") from exc

    def close(self) -> None:
        """Ends the child."""
        self._end()

    def _start(self) -> tuple[SpawnProcess, Connection]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        child = context.Process(target=_live, args=(theirs, self._work, self._limits), daemon=True)
        try:
            child.start()
        except OSError as exc:
            raise StateError(f"The decoding process cannot be started: {exc}.") from exc
        theirs.close()
        self._proven = False
        return child, ours

    def _once(self, request: bytes) -> Iterator[bytes]:
        if self._child[1].closed or (self._proven and not self._child[0].is_alive()):
            self._end()
            self._child = self._start()
        pipe = self._child[1]
        self._prove(pipe)
        ended = False
        try:
            pipe.send_bytes(request)
            while not ended:
                if not pipe.poll(self._limits.wall_s):
                    raise _DiedError(f"took more than {self._limits.wall_s:.0f} seconds", hopeless=True)
                reply = _REPLY.decode(pipe.recv_bytes(self._limits.reply_bytes))
                ended = reply.kind != "data"
                if reply.kind == "data":
                    yield reply.data
                else:
                    _raise(reply)
        except (OSError, EOFError, msgspec.MsgspecError) as exc:
            raise self._died() from exc
        finally:
            if not ended:  # dead, or nobody wants the rest
                self._end()

    def _prove(self, pipe: Connection) -> None:
        """A child that dies before it was asked anything is no object's fault: StateError."""
        if self._proven:
            return
        try:
            self._proven = pipe.poll(_START_S) and pipe.recv_bytes(len(_READY)) == _READY
        except (OSError, EOFError) as exc:
            self._end()
            raise StateError("The decoding process does not start.") from exc
        if not self._proven:
            self._end()
            raise StateError("The decoding process does not start.")

    def _died(self) -> _DiedError:
        self._child[0].join(_DYING_S)
        code = self._child[0].exitcode
        if code == -signal.SIGXCPU:
            return _DiedError(f"took more than {self._limits.cpu_s} seconds of processor time", hopeless=True)
        if code == _NO_MEMORY:
            return _DiedError("took more memory than one object may")
        how = "gave no answer" if code is None else f"{signal.Signals(-code).name}" if code < 0 else f"code {code}"
        return _DiedError(f"ended the decoding process {_TRIES} times ({how})")

    def _end(self) -> None:
        child, pipe = self._child
        child.kill()
        child.join(_JOIN_S)
        pipe.close()


class Cells:
    """Up to `many` cells for threads that each want all answers at once; a cell is started when it is first needed."""

    def __init__(self, work: Work, many: int, limits: Limits | None = None) -> None:
        self._work = work
        self._limits = limits
        self._free: queue.LifoQueue[Cell | None] = queue.LifoQueue()
        for _ in range(many):
            self._free.put(None)

    def ask(self, request: bytes) -> list[bytes]:
        """Returns what `work` yields, waiting for a free cell; raises as `Cell.ask` does."""
        cell = self._free.get()
        try:
            cell = cell or Cell(self._work, self._limits)
            return list(cell.ask(request))
        finally:
            self._free.put(cell)


class _DiedError(Exception):
    """The child died or had to be ended; `hopeless` when another one would as well."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hopeless = hopeless


class _Reply(Struct, frozen=True, array_like=True):
    kind: str  # data, done, peer, state, defect
    data: bytes = b""
    text: str = ""


_REPLY = msgspec.msgpack.Decoder(_Reply)


def _raise(reply: _Reply) -> None:
    if reply.kind == "peer":
        raise PeerError(reply.text)
    if reply.kind == "state":
        raise StateError(reply.text)
    if reply.kind == "defect":  # of ours, that one object found: it must not keep all others from being answered
        kind, place = reply.text.split(" ", 1)
        get_logger().error("imaging.defect", kind=kind, at=place)
        raise PeerError(f"Reading failed with {kind}.")


def _live(pipe: Connection, work: Work, limits: Limits) -> None:
    """The child: until its parent is gone."""
    _bound(limits)
    with suppress(EOFError, OSError):  # the parent has gone
        pipe.send_bytes(_READY)
        while True:
            request = pipe.recv_bytes()
            for reply in _replies(work, request, limits):
                pipe.send_bytes(msgspec.msgpack.encode(reply))


def _bound(limits: Limits) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold a patient's image
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE, "ascii")
    warnings.simplefilter("ignore")  # pydicom's quote values


def _replies(work: Work, request: bytes, limits: Limits) -> Iterator[_Reply]:
    try:
        wind_up(limits.cpu_s)
        for data in work(request):
            yield _Reply("data", data)
            wind_up(limits.cpu_s)
        yield _Reply("done")
    except Exception as exc:  # noqa: BLE001 whatever it is, the parent hears of it
        if isinstance(exc, MemoryError) or isinstance(exc.__cause__, MemoryError):
            os._exit(_NO_MEMORY)  # a fresh child has more, if what is missing has leaked
        yield _told(exc)


def wind_up(cpu_s: int) -> None:
    """Lets this process run for `cpu_s` more seconds of processor time."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + cpu_s, hard))


def _told(exc: Exception) -> _Reply:
    if isinstance(exc, (PeerError, StateError)):
        return _Reply("peer" if isinstance(exc, PeerError) else "state", text=exc.message)
    where = traceback.extract_tb(exc.__traceback__)[-1]  # not the message: it may quote the data set
    return _Reply("defect", text=f"{type(exc).__name__} {where.name}:{where.lineno}")
