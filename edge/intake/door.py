"""The DICOM door: C-ECHO, C-STORE and Storage Commitment as provider, answered only from what is durable.

The accept loop never reads: it waits for a connection's first bytes and hands it to a thread of its own, so that a
silent connection costs a file descriptor until ARTIM closes it. A TLS handshake, the association and its messages run
in that thread (edge.intake.association); only negotiated associations count against the limits.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from edge.intake.association import Association
from edge.intake.commitment import Commitments
from edge.intake.peers import MAX_ASSOCIATIONS, AllowList, plain_address
from edge.intake.services import Room, Visitor
from edge.intake.spool import Spool
from edge.intake.syntaxes import storage_classes, transfer_syntaxes
from edge.intake.tls import Tls
from shared.clock import Clock
from shared.errors import ConfigError, RadfleetError
from shared.log import get_logger

ARTIM_S = 10.0  # a connection that sends no whole association request for so long is closed (PS3.8 9.1.5)
IDLE_S = 60.0  # an association that stands still for so long is aborted
SILENT_CONNECTIONS = 512  # connections that said nothing yet; the oldest gives way
SILENT_OF_ONE_ADDRESS = 64
SPEAKING_CONNECTIONS = 256  # connections with a thread and no association yet; the oldest gives way
SPEAKING_OF_ONE_ADDRESS = 128
_BACKLOG = 128
_LOOK_S = 0.5


class Door:
    """The node's DICOM listener; an empty allow-list lets nobody in.

    `nudge` is called after an object is durable and after an association has ended, from the association's thread.
    With `tls` a second port speaks TLS; `port` None leaves the plain one closed.
    """

    def __init__(
        self,
        spool: Spool,
        *,
        ae_title: str,
        host: str,
        port: int | None,
        allow: AllowList,
        nudge: Callable[[], None],
        clock: Clock,
        tls: Tls | None = None,
        tls_port: int = 0,
        private_classes: Sequence[str] = (),
    ) -> None:
        self._spool = spool
        self._host = host
        self._ports = {"plain": port, "tls": tls_port if tls else None}
        self._tls = tls
        self._clock = clock
        self._nudge = nudge
        self._room = Room(
            spool=spool,
            ae_title=ae_title,
            allow=allow,
            storage=storage_classes(private_classes),
            syntaxes=transfer_syntaxes(),
            nudge=nudge,
            clock=clock,
            limit=MAX_ASSOCIATIONS,
        )
        self._selector = selectors.DefaultSelector()
        self._listeners: dict[str, socket.socket] = {}
        self._silent: OrderedDict[socket.socket, tuple[float, str]] = OrderedDict()  # since when, and from where
        self._speaking: OrderedDict[threading.Thread, tuple[socket.socket, str]] = OrderedDict()
        self._running: dict[threading.Thread, Association] = {}
        self._lock = threading.Lock()
        self._stopping = False
        self._loop: threading.Thread | None = None

    @property
    def port(self) -> int:
        """The plain port that is listened on; the one chosen when 0 was asked for."""
        return self._listening_on("plain")

    @property
    def tls_port(self) -> int:
        """The port that speaks TLS."""
        return self._listening_on("tls")

    @property
    def commitments(self) -> Commitments:
        """The storage commitments that were asked for here."""
        return self._room.commitments

    def alive(self) -> bool:
        """Tells whether the door still listens; a loop that ended takes the process with it."""
        return self._loop is not None and self._loop.is_alive()

    def counts(self) -> dict[str, int]:
        """Returns associations, rejections and outcomes since this process started, by name."""
        return self._room.counts()

    def start(self) -> None:
        """Starts to listen and returns.

        Raises:
            ConfigError: a port is taken, the host is none of this machine's, or the certificate cannot be used.
        """
        if self._tls:
            self._tls.context()
        for name, port in self._ports.items():
            if port is None:
                continue
            try:
                listener = _listen(self._host, port)
            except OSError as exc:
                raise ConfigError(
                    f"The DICOM door cannot listen on {self._host}:{port}: {exc}.",
                    cure="Set dicom.host and dicom.port (dicom.tls.port) to a free port of this machine.",
                ) from exc
            self._listeners[name] = listener
            self._selector.register(listener, selectors.EVENT_READ, name)
        self._loop = threading.Thread(target=self._run, name="dicom-door", daemon=True)
        self._loop.start()
        get_logger().info("intake.listening", **{name: self._listening_on(name) for name in self._listeners})

    def stop(self) -> None:
        """Ends listening and every association; what was answered is on the disk already."""
        self._stopping = True
        if self._loop is not None:
            self._loop.join(5.0)
        with self._lock:
            running = dict(self._running)
        for association in running.values():
            association.close()
        for thread in running:
            thread.join(5.0)
        for listener in self._listeners.values():
            listener.close()
        for silent in self._silent:
            silent.close()
        self._selector.close()

    def _listening_on(self, name: str) -> int:
        listener = self._listeners.get(name)
        return int(listener.getsockname()[1]) if listener else int(self._ports[name] or 0)

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(_LOOK_S):
                if isinstance(key.data, str):
                    self._accept(key.fileobj, key.data)  # type: ignore[arg-type]
                else:
                    self._begin(key.fileobj, *key.data)  # type: ignore[arg-type]
            now = self._clock.monotonic()
            while self._silent and next(iter(self._silent.values()))[0] <= now - ARTIM_S:
                self._drop(next(iter(self._silent)), "silent")

    def _accept(self, listener: socket.socket, name: str) -> None:
        try:
            sock, address = listener.accept()
        except OSError as exc:  # the peer is gone again, or this process has no descriptor left
            get_logger().warning("intake.accept_failed", error=type(exc).__name__)
            return
        sock.setblocking(False)
        host = plain_address(str(address[0]))
        mine = [one for one, (_, where) in self._silent.items() if where == host]
        if len(mine) >= SILENT_OF_ONE_ADDRESS:
            self._drop(mine[0], "crowded")
        elif len(self._silent) >= SILENT_CONNECTIONS:
            self._drop(next(iter(self._silent)), "crowded")
        self._silent[sock] = (self._clock.monotonic(), host)
        self._selector.register(sock, selectors.EVENT_READ, (host, name))

    def _drop(self, sock: socket.socket, how: str) -> None:
        self._selector.unregister(sock)
        self._silent.pop(sock)
        sock.close()
        self._room.count(how)

    def _begin(self, sock: socket.socket, host: str, name: str) -> None:
        """Gives a connection that began to speak a thread of its own."""
        self._selector.unregister(sock)
        since, _ = self._silent.pop(sock)
        thread = threading.Thread(target=self._serve, args=(sock, host, name, since), daemon=True)
        with self._lock:
            mine = [one for one, (_, where) in self._speaking.items() if where == host]
            if len(mine) >= SPEAKING_OF_ONE_ADDRESS:
                self._cut(mine[0])
            elif len(self._speaking) >= SPEAKING_CONNECTIONS:
                self._cut(next(iter(self._speaking)))
            self._speaking[thread] = sock, host
        try:
            thread.start()
        except RuntimeError as exc:  # no thread left: this connection goes, the door stays
            get_logger().error("intake.no_thread", error=str(exc))
            with self._lock:
                self._speaking.pop(thread, None)
            sock.close()
            self._room.count("crowded")

    def _cut(self, thread: threading.Thread) -> None:
        """Ends a connection that takes its time to become an association; under the lock."""
        sock, _ = self._speaking.pop(thread)
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own: its thread may be in the handshake
        self._room.count("crowded")

    def _heard(self) -> None:
        """The connection of this thread became an association, or ended."""
        with self._lock:
            self._speaking.pop(threading.current_thread(), None)

    def _serve(self, sock: socket.socket, host: str, name: str, since: float) -> None:
        artim_s = max(0.1, since + ARTIM_S - self._clock.monotonic())
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(artim_s)
            if name == "tls" and self._tls:
                sock = self._secured(sock, host, self._tls)
        except (OSError, ValueError, RadfleetError) as exc:
            self._room.count("tls_refused")
            get_logger().warning("intake.tls_refused", address=host, error=_handshake_failure(exc))
            sock.close()
            self._heard()
            return
        visitor = Visitor(self._room, host, welcomed=self._heard)
        association = Association(sock, visitor, clock=self._clock, artim_s=artim_s, idle_s=IDLE_S)
        me = threading.current_thread()
        with self._lock:
            if self._stopping:
                sock.close()
                return
            self._running[me] = association
        how = "fault"
        try:
            how = association.serve()
        except Exception as exc:  # noqa: BLE001 a defect ends one association, not the door
            get_logger().error("intake.fault", error=type(exc).__name__)  # the message may quote the data set
        finally:
            sock.close()
            visitor.left(how, association.waits)
            with self._lock:
                self._running.pop(me, None)
            self._heard()

    def _secured(self, sock: socket.socket, host: str, tls: Tls) -> ssl.SSLSocket:
        """Returns the connection after its handshake; the caller's own socket is of no use afterwards."""
        secured = tls.context().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        try:
            with self._lock:
                if threading.current_thread() not in self._speaking:
                    raise TimeoutError("Others came meanwhile.")
                self._speaking[threading.current_thread()] = secured, host
            secured.do_handshake()
        except BaseException:
            secured.close()
            raise
        return secured


def _listen(host: str, port: int) -> socket.socket:
    """A listener on every address of the host; `0.0.0.0` and `::` mean all of their family."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _handshake_failure(exc: Exception) -> str:
    if isinstance(exc, ssl.SSLError):
        return str(exc.reason or exc)  # names cipher, version or certificate
    return str(exc) if isinstance(exc, (RadfleetError, TimeoutError)) else type(exc).__name__
