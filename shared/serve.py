"""Serving HTTP from one process on one or more ports, and the headers that every answer carries."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from shared.errors import ConfigError, RadfleetError, StateError

# No CDN, no inline script, no frame: everything a page needs comes from this server.
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)
_SHUTDOWN_S = 1
_START_S = 20.0


@dataclass(frozen=True)
class Listener:
    """One port. With `certificate` and `key` it speaks TLS, with `client_ca` it demands a certificate (TLS 1.3)."""

    app: ASGIApp
    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None


class SecurityHeaders:
    """ASGI middleware that adds the headers above to every answer that does not set them itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *((n, v) for n, v in _HEADERS if n not in own)]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _PeerProtocol(H11Protocol):
    """Hands the verified client certificate (DER) to the application as `scope["peer_certificate"]`."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        certificate = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        inner = self.app

        async def with_peer(scope: Any, receive: Any, send: Any) -> None:
            await inner({**scope, "peer_certificate": certificate}, receive, send)

        self.app = with_peer


def serve(listeners: Sequence[Listener], stop: threading.Event, ready: Callable[[], None]) -> None:
    """Serves until `stop`; calls `ready` once every port accepts connections.

    Raises:
        ConfigError: a port cannot be opened, or a certificate or key cannot be read.
    """
    servers = [uvicorn.Server(_configuration(listener)) for listener in listeners]
    # Threads: uvicorn installs signal handlers only in the main thread, and there we want our own.
    threads = [threading.Thread(target=_run, args=(server,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        end = time.monotonic() + _START_S
        while not all(server.started for server in servers):
            dead = [ln for ln, thread in zip(listeners, threads, strict=True) if not thread.is_alive()]
            if dead or time.monotonic() > end:
                where = ", ".join(f"{ln.host}:{ln.port}" for ln in dead or listeners)
                raise ConfigError(f"Cannot listen on {where}.", cure="Choose a free port and a local address.")
            time.sleep(0.01)
        ready()
        while not stop.wait(0.2):
            if not all(thread.is_alive() for thread in threads):
                raise StateError("A listener ended by itself.", cure="Read the log; the supervisor restarts it.")
    finally:
        for server in servers:
            server.should_exit = True
        for thread in threads:
            thread.join(_SHUTDOWN_S * 2)


def status_of(error: RadfleetError) -> int:
    """Returns the HTTP status that stands for an error of ours, by who must act."""
    by_family = {65: 400, 69: 502, 77: 403, 73: 507, 74: 503, 78: 500}
    return by_family.get(error.exit_code, 500)


def _run(server: uvicorn.Server) -> None:
    try:
        server.run()
    except SystemExit:  # uvicorn's way to say that the port is taken; it has logged the reason
        return


def _configuration(listener: Listener) -> uvicorn.Config:
    config = uvicorn.Config(
        listener.app,
        host=listener.host,
        port=listener.port,
        http=_PeerProtocol if listener.client_ca else "h11",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        ssl_certfile=listener.certificate,
        ssl_keyfile=listener.key,
        ssl_ca_certs=str(listener.client_ca) if listener.client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if listener.client_ca else ssl.CERT_NONE,
    )
    try:
        config.load()
    except OSError as exc:  # ssl.SSLError is one
        raise ConfigError(
            f"The certificate {listener.certificate} or its key cannot be used: {exc}.",
            cure="Name a PEM chain and its key.",
        ) from exc
    if config.ssl:
        modern = ssl.TLSVersion.TLSv1_3 if listener.client_ca else ssl.TLSVersion.TLSv1_2
        config.ssl.minimum_version = modern
    return config
