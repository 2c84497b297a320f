"""The node port: downloads for enrolled nodes, and renewal. TLS has verified the device certificate before we run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import Engine

from cloud.access.authority import Authority
from cloud.access.enrolment import device_of
from cloud.access.est import renewal_router
from cloud.objects import Objects
from cloud.web.errors import as_json
from shared.clock import Clock
from shared.errors import RadfleetError, TrustError
from shared.files import read_limited
from shared.serve import SecurityHeaders

METADATA_LIMIT_BYTES = 5_000_000
PIECE_BYTES = 256 * 1024
_METADATA_NAME = re.compile(r"(?:\d{1,9}\.)?(?:root|targets|snapshot|timestamp)\.json")
_RANGE = re.compile(r"bytes=(\d{1,12})-(\d{0,12})")


def node_app(
    engine: Engine, clock: Clock, authority: Authority, objects: Objects, *, release: Path, director: Path
) -> SecurityHeaders:
    """Returns the application of the node port.

    Args:
        release: folder of the release repository's metadata.
        director: folder of the director's metadata.
    """

    def enrolled(request: Request) -> None:
        with engine.connect().execution_options(read_only=True) as conn:
            if device_of(conn, request.scope["peer_certificate"], clock.now()) is None:
                raise TrustError("The device certificate does not count any more.", cure="Enrol the node again.")

    app = FastAPI(openapi_url=None, dependencies=[Depends(enrolled)])
    app.add_exception_handler(RadfleetError, as_json)  # type: ignore[arg-type]  # Starlette asks for any Exception
    app.include_router(renewal_router(engine, clock, authority))
    folders = {"release": release, "director": director}

    @app.get("/tuf/{repository}/{name}")
    def metadata(repository: str, name: str) -> Response:
        folder = folders.get(repository)
        if folder is None or not _METADATA_NAME.fullmatch(name) or not (folder / name).is_file():
            return Response(status_code=404)
        return Response(read_limited(folder / name, METADATA_LIMIT_BYTES), media_type="application/json")

    @app.get("/blobs/{digest}")
    def blob(digest: str, request: Request) -> Response:
        if not re.fullmatch("[0-9a-f]{64}", digest) or not objects.has(digest):
            return Response(status_code=404)
        return send_blob(objects, digest, request.headers.get("range"))

    return SecurityHeaders(app)


def send_blob(objects: Objects, digest: str, wanted: str | None) -> Response:
    """Returns the object, or the one range of it that `wanted` (a Range header) names; 416 beyond its end."""
    length = objects.length(digest)
    headers = {"Accept-Ranges": "bytes", "ETag": f'"{digest}"'}
    first, last, status = 0, length - 1, 200
    match = _RANGE.fullmatch(wanted or "")
    if match:
        first = int(match[1])
        last = min(int(match[2]) if match[2] else length - 1, length - 1)
        if first > last:
            return Response(status_code=416, headers={"Content-Range": f"bytes */{length}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{length}"
        status = 206
    headers["Content-Length"] = str(last - first + 1)
    return StreamingResponse(
        _pieces(objects.open(digest), first, last - first + 1),
        status,
        headers,
        media_type="application/octet-stream",
    )


def _pieces(file: BinaryIO, first: int, count: int) -> Iterator[bytes]:
    with file:
        file.seek(first)
        while count > 0 and (piece := file.read(min(PIECE_BYTES, count))):
            count -= len(piece)
            yield piece
