"""The echo that the page sends: a C-ECHO, and in plain words why it failed."""

from __future__ import annotations

import socket
import ssl

from edge.forward.peer import Peer, echo
from shared.errors import LinkError

PROBE_S = 3.0


def ask(peer: Peer, ours: str) -> None:
    """Sends a C-ECHO.

    Raises:
        LinkError: it failed; message and cure are for people.
        ConfigError: the peer's TLS files cannot be used.
    """
    try:
        echo(peer, ours=ours)
    except LinkError as exc:
        if peer.tls is None and speaks_tls(peer.host, peer.port):
            raise LinkError(
                f"{peer} speaks TLS only.",
                cure="Name its CA in a [[destination]] of the configuration, or give its port without TLS.",
            ) from exc
        raise


def speaks_tls(host: str, port: int) -> bool:
    """Tells whether a TLS server answers there; nothing is trusted and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=PROBE_S) as plain,
            context.wrap_socket(plain, server_hostname=host),
        ):
            return True
    except ssl.SSLError as exc:
        return "ALERT" in (exc.reason or "")  # it answered in TLS, and does not want us
    except OSError:
        return False
