"""A power cut without a switch: the system calls of a real process, replayed onto a disk that forgets.

`traced` puts strace in front of a command. `Trace` reads what it wrote. `Disk` is what POSIX promises of a disk and no
more: the bytes of a file as of its last fsync, the names in a folder as of the folder's last fsync. After any number
of system calls `Disk.survivors` says what a cut at that moment leaves.

The model is harder than ext4 or XFS, which write much on their own account, and it knows no torn fsync.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge.intake import pdu

CALLS = (
    "open,openat,creat,close,write,pwrite64,writev,pwritev,lseek,fsync,fdatasync,ftruncate,truncate,fallocate,"
    "rename,renameat,renameat2,link,linkat,unlink,unlinkat,mkdir,mkdirat,rmdir,dup,dup2,dup3,sendto,sendmsg"
)
_LINE = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)$")
_END = re.compile(r"^(.*)\)\s+= (-?\d+)[^\"]*$")


def traced(trace: Path, *more: str) -> list[str]:
    """Returns what stands before a command whose system calls are to be written to `trace`."""
    return ["strace", "-f", "--seccomp-bpf", "-xx", "-s", "4000000", "-o", str(trace), "-e", f"trace={CALLS}", *more]


@dataclass(frozen=True)
class Call:
    """One system call; `began` and `ended` tell whether this event is its begin, its end, or both at once."""

    thread: int
    name: str
    words: tuple[str, ...]
    result: int
    began: bool
    ended: bool

    def text(self, number: int) -> bytes:
        """Returns a string argument."""
        return bytes.fromhex(self.words[number].strip('".').replace("\\x", ""))

    def number(self, number: int) -> int:
        """Returns an integer argument; -1 when it is a name."""
        word = self.words[number]
        return int(word) if word.isdecimal() else -1


def read_trace(path: Path) -> list[Call]:
    """Returns the calls in the order in which they began and ended."""
    open_calls: dict[int, tuple[str, str]] = {}
    calls = []
    for line in path.read_text().splitlines():
        match = _LINE.match(line)
        if match is None:
            continue  # a signal, an exit
        thread, name, rest = int(match[1]), match[2], match[3]
        if rest.endswith("<unfinished ...>"):
            begun = rest.removesuffix("<unfinished ...>").rstrip()
            open_calls[thread] = name, begun
            calls.append(Call(thread, name, _words(begun), 0, began=True, ended=False))
            continue
        end = _END.match(rest)
        if end is None:
            continue  # the process died in it: `= ?`
        resumed = open_calls.pop(thread, None) if "resumed>" in line else None
        arguments = (resumed[1] if resumed else "") + end[1]
        calls.append(Call(thread, name, _words(arguments), int(end[2]), began=resumed is None, ended=True))
    return calls


def _words(arguments: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in arguments.split(","))  # strings are hexadecimal: no comma in them


@dataclass
class File:
    """A file: what it holds, what it held when it was last synced, and the changes between."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    changes: list[tuple[int, Callable[[bytearray], None]]] = field(default_factory=list)


@dataclass
class Folder:
    """A folder, in the same way."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    changes: list[tuple[int, Callable[[dict[str, File | Folder]], None]]] = field(default_factory=list)


Tree = dict[str, "bytes | Tree"]


class Disk:
    """See the module's docstring. `ignoring` names kinds of fsync that this disk does not perform: "file" and "folder"
    are those of the spool's objects and of the spool's folder."""

    def __init__(self, root: Path, *, ignoring: Sequence[str] = ()) -> None:
        self.root = root
        self.top = Folder()
        self.acknowledged: list[str] = []  # SOP Instance UIDs answered with Success, in order
        self.committed = 0  # requests for storage commitment answered with Success
        self.epoch = 0  # rises with everything that changes what a cut leaves, or what was promised
        self._ignoring = ignoring
        self._clock = 0
        self._open: dict[int, tuple[File | Folder, str]] = {}
        self._at: dict[int, int] = {}
        self._syncing: dict[int, int] = {}

    def restart(self) -> None:
        """The process is gone: its descriptors are closed, nothing else has changed."""
        self._open.clear()
        self._at.clear()
        self._syncing.clear()

    def apply(self, call: Call) -> None:
        """Follows one event of a trace."""
        self._clock += 1
        if call.began:
            self._begin(call)
        if call.ended and call.result >= 0:
            self._end(call)

    def _begin(self, call: Call) -> None:
        if call.name in ("sendto", "sendmsg"):
            self._acknowledge(call)
        elif call.name in ("fsync", "fdatasync"):
            self._syncing[call.thread] = self._clock
        elif call.name == "close":  # another thread may be given the number before the call ends
            self._open.pop(call.number(0), None)

    def _end(self, call: Call) -> None:
        if call.name in ("fsync", "fdatasync"):
            self._sync(call.number(0), self._syncing[call.thread])
        elif call.name not in ("sendto", "sendmsg", "close"):
            action = getattr(self, f"_{call.name}", None)
            if action is not None:
                action(call)
            elif call.number(0) in self._open or self._inside(call):
                raise NotImplementedError(call.name)

    def visible(self) -> Tree:
        """What every process sees, and a killed one leaves."""
        return _tree(self.top, lambda one: dict(one.now) if isinstance(one, Folder) else bytes(one.now))

    def survivors(self, luck: random.Random | None = None) -> Tree:
        """What a power cut leaves: what was synced, and with `luck` any part of what was not."""

        def left(one: File | Folder) -> dict[str, File | Folder] | bytes:
            kept = dict(one.synced) if isinstance(one, Folder) else bytearray(one.synced)
            for _, change in one.changes if luck else ():
                if luck and luck.random() < 0.5:
                    change(kept)  # type: ignore[arg-type]
            return kept if isinstance(kept, dict) else bytes(kept)

        return _tree(self.top, left)

    def _inside(self, call: Call) -> bool:
        return any(word.startswith('"') and self._find(call.text(n)) for n, word in enumerate(call.words))

    def _find(self, path: bytes) -> tuple[Folder, str] | None:
        """Returns the folder and the name of a path below the root."""
        try:
            parts = Path(path.decode()).relative_to(self.root).parts
        except ValueError:
            return None
        folder: File | Folder = self.top
        for part in parts[:-1]:
            folder = folder.now[part]  # type: ignore[union-attr,assignment]
        assert isinstance(folder, Folder)
        return folder, parts[-1] if parts else ""

    def _in_folder(self, folder: Folder, change: Callable[[dict[str, File | Folder]], None]) -> None:
        change(folder.now)
        folder.changes.append((self._clock, change))

    def _in_file(self, file: File, change: Callable[[bytearray], None]) -> None:
        change(file.now)
        file.changes.append((self._clock, change))

    def _openat(self, call: Call) -> None:
        found = self._find(call.text(1))
        if found is None:
            return
        folder, name = found
        one: File | Folder | None = folder.now.get(name) if name else folder
        if one is None:
            assert "O_CREAT" in call.words[2], call
            one = made = File()
            self._in_folder(folder, lambda names: names.__setitem__(name, made))
        elif "O_TRUNC" in call.words[2] and isinstance(one, File):
            self._in_file(one, lambda data: data.clear())
        self._open[call.result] = one, call.text(1).decode()
        self._at[call.result] = 0

    def _lseek(self, call: Call) -> None:
        self._at[call.number(0)] = call.result

    def _write(self, call: Call) -> None:
        if call.number(0) in self._open:
            self._put(call, self._at[call.number(0)])
            self._at[call.number(0)] += call.result

    def _pwrite64(self, call: Call) -> None:
        if call.number(0) in self._open:
            self._put(call, call.number(3))

    def _put(self, call: Call, at: int) -> None:
        file, _ = self._open[call.number(0)]
        assert isinstance(file, File)
        written = call.text(1)[: call.result]
        assert len(written) == call.result, "strace has cut the data short"

        def put(data: bytearray) -> None:
            if len(data) < at:
                data.extend(bytes(at - len(data)))
            data[at : at + len(written)] = written

        self._in_file(file, put)

    def _ftruncate(self, call: Call) -> None:
        file, length = self._open[call.number(0)][0], call.number(1)
        assert isinstance(file, File)

        def cut(data: bytearray) -> None:
            del data[length:]
            data.extend(bytes(length - len(data)))

        self._in_file(file, cut)

    def _mkdir(self, call: Call) -> None:
        found = self._find(call.text(0))
        if found and found[1]:
            made = Folder()
            self._in_folder(found[0], lambda names: names.__setitem__(found[1], made))

    def _unlink(self, call: Call) -> None:
        found = self._find(call.text(0))
        if found:
            self._in_folder(found[0], lambda names: names.pop(found[1], None))  # type: ignore[arg-type,return-value]

    def _rename(self, call: Call) -> None:
        old, new = self._find(call.text(0)), self._find(call.text(1))
        assert old is not None
        assert new is not None
        moved = old[0].now[old[1]]

        def leave(names: dict[str, File | Folder]) -> None:
            names.pop(old[1], None)

        def arrive(names: dict[str, File | Folder]) -> None:
            names[new[1]] = moved
            if old[0] is new[0]:
                leave(names)  # inside one folder both happen or none

        self._in_folder(new[0], arrive)
        if old[0] is not new[0]:
            self._in_folder(old[0], leave)

    def _sync(self, descriptor: int, began: int) -> None:
        if descriptor not in self._open:
            return
        one, path = self._open[descriptor]
        if Path(path) == self.root / "spool":
            kind = "folder"
        else:
            kind = "file" if Path(path).parent == self.root / "spool" else ""
        if kind in self._ignoring:
            return
        synced = dict(one.synced) if isinstance(one, Folder) else bytearray(one.synced)
        for when, change in one.changes:
            if when <= began:
                change(synced)  # type: ignore[arg-type]
        one.changes = [change for change in one.changes if change[0] > began]  # type: ignore[assignment]
        one.synced = synced if isinstance(synced, dict) else bytes(synced)  # type: ignore[assignment]
        self.epoch += 1

    def _acknowledge(self, call: Call) -> None:
        """What is said counts from the moment at which the call begins: the peer may hear it before it ends."""
        data = memoryview(call.text(1)) if call.words[1].startswith('"') else memoryview(b"")
        while len(data) > 6:
            kind, length = data[0], int.from_bytes(data[2:6], "big")
            if kind == pdu.P_DATA:
                for _, control, fragment in pdu.values(data[6 : 6 + length]):
                    command = pdu.parse_command(bytes(fragment)) if control == 3 else pdu.Command({})
                    success = command.number(pdu.STATUS) == 0
                    if success and command.number(pdu.FIELD) == pdu.C_STORE_RQ | pdu.RESPONSE:
                        self.acknowledged.append(command.uid(pdu.AFFECTED_INSTANCE))
                    self.committed += success and command.number(pdu.FIELD) == pdu.N_ACTION_RQ | pdu.RESPONSE
                    self.epoch += success
            data = data[6 + length :]


def cuts(disk: Disk, calls: Sequence[Call]) -> Iterator[int]:
    """Applies the calls one by one, and yields the number of each after which a cut leaves or breaks something else."""
    epoch = -1
    for number, call in enumerate(calls):
        disk.apply(call)
        if disk.epoch != epoch:
            epoch = disk.epoch
            yield number


def lay_out(tree: Tree, folder: Path) -> None:
    """Writes a tree to a real folder; an index's shared memory does not outlive the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in tree.items():
        if isinstance(one, bytes):
            if not name.endswith("-shm"):
                (folder / name).write_bytes(one)
        else:
            lay_out(one, folder / name)


def _tree(folder: Folder, content: Callable[[File | Folder], dict[str, File | Folder] | bytes]) -> Tree:
    names = content(folder)
    assert isinstance(names, dict)
    tree: Tree = {}
    for name, one in names.items():
        if isinstance(one, Folder):
            tree[name] = _tree(one, content)
        else:
            data = content(one)
            assert isinstance(data, bytes)
            tree[name] = data
    return tree
