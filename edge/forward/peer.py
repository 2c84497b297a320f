"""A DICOM peer that this node calls: its address, an association with it, and in plain words why there is none."""

from __future__ import annotations

import queue
import socket
import ssl
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pynetdicom
from msgspec import Struct
from pynetdicom import AE, build_context, evt
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import Verification

from edge.intake.meta import IMPLEMENTATION_UID
from shared.errors import ConfigError, LinkError

CONNECT_S = 10.0
ANSWER_S = 60.0
SLOWEST_BYTES_S = 250_000.0  # a peer is given this long for an object, on top of ANSWER_S
_STALL_S = 60  # of a peer that stops reading
_SEND_AHEAD = 64  # PDUs waiting for the network: the library itself would queue a whole object in memory


# PS3.8 table 9-21: (source, reason) of a rejection, what to do about it.
_REJECTED: dict[tuple[int, int], tuple[str, str]] = {
    (1, 2): ("it does not speak DICOM's application context", "Check that host and port are those of a DICOM server."),
    (1, 3): ("it does not know the calling AE title {ours}", "Add {ours}, with this machine's address, at the peer."),
    (1, 7): ("it has no AE title {theirs}", "Correct the called AE title; upper and lower case differ."),
    (2, 2): ("it speaks another protocol version", "Check that host and port are those of a DICOM server."),
    (3, 1): ("it is busy", "Try again later."),
    (3, 2): ("all its associations are taken", "Try again later, or raise the peer's limit."),
}


# What a connection fails with, the special before the general.
_NOT_CONNECTED: tuple[tuple[type[OSError], str, str], ...] = (
    (
        ssl.SSLCertVerificationError,
        "{peer}: its certificate is not trusted: {reason}.",
        "Name the CA that signed it, and the host as the certificate names it.",
    ),
    (
        ssl.SSLError,
        "{peer}: TLS fails: {reason}.",
        "Check that the port speaks TLS, and that the peer trusts our certificate if it asks for one.",
    ),
    (socket.gaierror, "The host {host} has no address.", "Correct the host name, or ask for DNS."),
    (ConnectionRefusedError, "Nobody listens on {host}:{port}.", "Start the peer, or correct the port."),
    (TimeoutError, f"{{peer}} does not answer within {CONNECT_S:.0f} s.", "Check address and firewall."),
    (OSError, "{peer} cannot be reached: {reason}.", "Check address, route, firewall, and whether it wants TLS."),
)


class Tls(Struct, frozen=True):
    """PEM files: who is trusted, and who we are where the peer asks for it."""

    ca: Path
    certificate: Path | None = None
    key: Path | None = None


class Peer(Struct, frozen=True):
    """Whom to call; `name` is for people."""

    name: str
    ae_title: str
    host: str
    port: int
    tls: Tls | None = None

    def __str__(self) -> str:
        return f"{self.ae_title} at {self.host}:{self.port}"


@contextmanager
def association(peer: Peer, contexts: Sequence[PresentationContext], *, ours: str) -> Iterator[Any]:
    """Yields an established pynetdicom association and releases it; the body may find it gone at any time.

    Args:
        peer: whom to call.
        contexts: what to propose, at most 128.
        ours: our AE title.

    Raises:
        LinkError: there is none, with the cause and its cure.
        ConfigError: the peer's TLS files cannot be used.
    """
    _settle_the_library()
    ae = AE(ae_title=ours)
    ae.implementation_class_uid = IMPLEMENTATION_UID
    ae.connection_timeout = ae.acse_timeout = CONNECT_S
    ae.dimse_timeout = ANSWER_S
    ae.network_timeout = None  # it counts while we think, not while the peer does; ANSWER_S and _STALL_S do that
    ae.requested_contexts = list(contexts)
    try:
        found = ae.associate(
            peer.host,
            peer.port,
            ae_title=peer.ae_title,
            tls_args=(tls_context(peer.tls), peer.host) if peer.tls else None,
            evt_handlers=[(evt.EVT_CONN_OPEN, _tune)],
        )
    except OSError as exc:  # a host without an address
        raise _why_no_connection(peer) from exc
    if not found.is_established:
        raise _why_not(peer, found, ours)
    found.dul.to_provider_queue = _SendAhead(found)
    try:
        yield found
    except LinkError:
        raise
    except BaseException:
        if found.is_established:
            found.abort()  # in the middle of something
        raise
    finally:
        if found.is_established:
            found.release()


def echo(peer: Peer, *, ours: str) -> None:
    """Asks a peer whether it is there (C-ECHO); LinkError with cause and cure when it is not."""
    with association(peer, [build_context(Verification)], ours=ours) as found:
        status = found.send_c_echo()
    if "Status" not in status or int(status.Status) != 0x0000:
        said = f"answers 0x{int(status.Status):04X}" if "Status" in status else "does not answer"
        raise LinkError(f"{peer} {said} to an echo.", cure="Look at the peer's log.")


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Returns a client's context: TLS 1.2 or later, the peer's certificate and name are checked.

    Raises:
        ConfigError: a file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=str(tls.ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.certificate:
            context.load_cert_chain(str(tls.certificate), str(tls.key) if tls.key else None)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(
            f"The TLS files cannot be used: {exc}.",
            cure="Name PEM files: --ca, --cert and --key, or ca, certificate, key.",
        ) from exc
    return context


def _why_not(peer: Peer, found: Any, ours: str) -> LinkError:
    answer = found.acceptor.primitive
    if found.is_rejected and answer is not None:
        pair = (int(answer.result_source or 0), int(answer.diagnostic or 0))
        what, cure = _REJECTED.get(pair, ("it gives no reason", "Look at the peer's log."))
        names = {"ours": ours, "theirs": peer.ae_title}
        return LinkError(f"{peer} rejects the association: {what.format(**names)}.", cure=cure.format(**names))
    if answer is not None and answer.result == 0x00:
        return LinkError(
            f"{peer} accepts none of what was proposed.",
            cure="Allow these SOP classes and transfer syntaxes for our AE title at the peer.",
        )
    return _why_no_connection(peer)


def _why_no_connection(peer: Peer) -> LinkError:
    """The library keeps the cause of a failed connection to itself, so it is looked for again."""
    try:
        with socket.create_connection((peer.host, peer.port), timeout=CONNECT_S) as plain:
            if peer.tls is not None:
                with tls_context(peer.tls).wrap_socket(plain, server_hostname=peer.host) as secure:
                    secure.settimeout(1.0)
                    with suppress(TimeoutError):
                        secure.recv(1)  # in TLS 1.3 a server refuses our certificate only now
    except OSError as exc:
        said, cure = next((said, cure) for kind, said, cure in _NOT_CONNECTED if isinstance(exc, kind))
        reason = getattr(exc, "verify_message", "") or getattr(exc, "reason", "") or exc.strerror or str(exc)
        reason = reason.replace("_", " ").lower()
        return LinkError(said.format(peer=peer, host=peer.host, port=peer.port, reason=reason), cure=cure)
    return LinkError(
        f"{peer} takes the connection and then hangs up or says nothing.",
        cure="Check that the port is a DICOM port, whether it wants TLS, and that it knows our AE title.",
    )


def _settle_the_library() -> None:
    pynetdicom._config.LOG_HANDLER_LEVEL = "none"  # it would format every PDU for its log
    pynetdicom._config.STORE_SEND_CHUNKED_DATASET = True  # objects go from the file to the network, as they are


def _tune(event: Any) -> None:
    """Small objects wait 40 ms each for the peer's delayed acknowledgement where Nagle's algorithm is on."""
    raw: socket.socket = event.assoc.dul.socket.socket
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _STALL_S, 0))


class _SendAhead(queue.Queue[Any]):
    """A bounded queue between reading a file and the network."""

    def __init__(self, found: Any) -> None:
        super().__init__(_SEND_AHEAD)
        self._found = found

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        while self._found.dul.is_alive():
            try:
                super().put(item, block, timeout=0.5)
            except queue.Full:
                if not block:
                    raise
            else:
                return
