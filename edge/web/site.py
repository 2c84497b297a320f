"""The reading page's application: pages, the JSON interface, files, and one answer for every refusal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

import shared.pages
from edge.web.api import api_router
from edge.web.dicomweb.routes import PREFIX, DicomWeb, dicomweb_router, refusal
from edge.web.door import Door
from edge.web.door_pages import door_router
from edge.web.forwarding import Forwarding, forwarding_router
from edge.web.labels import Labels
from edge.web.pages import Pages, page_router
from edge.web.session import Gatekeeper, SignInNeededError
from edge.web.studies import NoSuchAnswerError, Studies
from shared.clock import Clock
from shared.errors import RadfleetError
from shared.log import get_logger
from shared.serve import SecurityHeaders, status_of

STATIC = Path(__file__).parent / "static"


def web_app(
    studies: Studies,
    labels: Labels,
    clock: Clock,
    *,
    dicomweb: DicomWeb,
    door: Door,
    forwarding: Forwarding | None = None,
) -> SecurityHeaders:
    """Returns the application of the reading page, with DICOMweb under /dicom-web."""
    app = FastAPI(openapi_url=None)
    keeper, pages = Gatekeeper(labels, clock), Pages(studies)
    app.include_router(api_router(studies, labels, keeper))
    app.include_router(page_router(studies, labels, keeper, pages))
    app.include_router(door_router(door, labels, keeper, pages, clock))
    app.include_router(dicomweb_router(dicomweb, labels, keeper))
    if forwarding is not None:
        app.include_router(forwarding_router(forwarding, keeper, pages))
    app.mount("/static", StaticFiles(directory=shared.pages.FOLDER))
    app.mount("/reading", StaticFiles(directory=STATIC))

    @app.exception_handler(RadfleetError)
    async def refuse(request: Request, exc: RadfleetError) -> Response:
        if not isinstance(exc, SignInNeededError):
            get_logger().warning("web.refused", reason=exc.message)
        status = 404 if isinstance(exc, NoSuchAnswerError) else status_of(exc)
        if request.url.path.startswith(f"{PREFIX}/"):
            return refusal(exc)
        if request.url.path.startswith("/api/"):
            status = 401 if isinstance(exc, SignInNeededError) else status
            return JSONResponse({"error": exc.message, "cure": exc.cure}, status)
        if isinstance(exc, SignInNeededError):
            # htmx would put the login page into the middle of this one: it is told to go there instead.
            if "hx-request" in request.headers:
                return Response(headers={"HX-Redirect": "/login"})
            return RedirectResponse("/login", 303)
        return pages.show("refused.html", status=status, message=exc.message, cure=exc.cure)

    return SecurityHeaders(_open_to_viewers(app, dicomweb.origins) if dicomweb.origins else app)


def _open_to_viewers(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """Lets other sites read /dicom-web, and nothing else, with a bearer token (CORS without credentials)."""
    cors = CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
        expose_headers=["warning"],
    )

    async def open_to_viewers(scope: Scope, receive: Receive, send: Send) -> None:
        inside = scope["type"] == "http" and scope["path"].startswith(f"{PREFIX}/")
        await (cors if inside else app)(scope, receive, send)

    return open_to_viewers
