"""A node port for tests: HTTPS with client certificates, Range, and faults on order."""

from __future__ import annotations

import http.server
import ssl
import threading
from pathlib import Path
from typing import Any

from tests.simulators.pki import TestAuthority


class NodePortServer:
    """Serves `files` by path. `cut_after` ends one answer after so many bytes; `ignore_range` knows no Range."""

    def __init__(self, folder: Path) -> None:
        self.authority = TestAuthority(folder / "pki")
        leaf = self.authority.issue("server")
        self.node = self.authority.node("hosp-a", "n1")
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.served = 0  # bytes of bodies
        self.cut_after: int | None = None
        self.ignore_range = False
        self.status: int | None = None
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_args: Any) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(leaf.certificate, leaf.key_file)
        context.load_verify_locations(self.authority.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range", "")
        self.requests.append((request.path, wanted))
        data = self.files.get(request.path)
        if data is None or self.status is not None:
            request.send_response(self.status or 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted and not self.ignore_range else 0
        body = data[start:]
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        cut, self.cut_after = self.cut_after, None
        sent = body if cut is None else body[:cut]
        self.served += len(sent)
        request.wfile.write(sent)
        if cut is not None:
            request.close_connection = True

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
