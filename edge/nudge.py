"""A nudge from one process to another: any datagram on a Unix socket. It may be lost; polling is the fallback."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path


class Nudge:
    """Wakes whoever listens at `path`, from any thread; says nothing when nobody does. Keeps its socket: the door
    nudges after every object."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._name = str(path) if len(os.fsencode(path)) <= _NAME_BYTES else ""
        self._sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sender.setblocking(False)

    def __call__(self) -> None:
        """Sends the nudge."""
        with contextlib.suppress(OSError):
            if self._name:
                self._sender.sendto(b"!", self._name)
            else:
                with short_name(self._path) as name:
                    self._sender.sendto(b"!", name)


_NAME_BYTES = 107  # what the kernel takes


class Ear:
    """Listens at `path`; one process owns it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        with short_name(path) as name:
            self._socket.bind(name)

    def wait(self, seconds: float) -> bool:
        """Returns True as soon as a nudge came, False after `seconds`; nudges that piled up count as one."""
        ready, _, _ = select.select([self._socket], [], [], seconds)
        if not ready:
            return False
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(16)
        return True

    def close(self) -> None:
        """Closes the socket; its name stays for the next owner."""
        self._socket.close()


@contextlib.contextmanager
def short_name(path: Path) -> Iterator[str]:
    """Names the socket through its folder's descriptor: the kernel takes 107 bytes, state folders may be deeper."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
