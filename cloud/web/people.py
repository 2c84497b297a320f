"""The people port: pages, the JSON interface, and enrolment, which is the only part that needs no sign-in."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response
from sqlalchemy import Engine
from starlette.staticfiles import StaticFiles

import shared.pages
from cloud.access.authority import Authority
from cloud.access.est import enrolment_router
from cloud.web.api import api_router
from cloud.web.errors import as_json
from cloud.web.fleet import Deeds
from cloud.web.pages import Pages, page_router
from cloud.web.session import Gatekeeper, SignInNeededError
from shared.clock import Clock
from shared.errors import RadfleetError
from shared.serve import SecurityHeaders, status_of
from shared.wire.enrolment import Welcome

_FOR_PROGRAMS = ("/api/", "/.well-known/")


def people_app(
    engine: Engine, clock: Clock, authority: Authority, welcome: Callable[[], Welcome], deeds: Deeds
) -> SecurityHeaders:
    """Returns the application of the people port."""
    app = FastAPI(openapi_url=None)
    keeper, pages = Gatekeeper(engine, clock), Pages()
    app.include_router(enrolment_router(engine, clock, authority, welcome))
    app.include_router(api_router(engine, clock, authority, keeper, deeds))
    app.include_router(page_router(engine, clock, authority, keeper, deeds, pages))
    app.mount("/static", StaticFiles(directory=shared.pages.FOLDER))

    @app.exception_handler(RadfleetError)
    async def refuse(request: Request, exc: RadfleetError) -> Response:
        if request.url.path.startswith(_FOR_PROGRAMS):
            return as_json(request, exc)
        if isinstance(exc, SignInNeededError):
            # htmx would put the login page into the middle of this one: it is told to go there instead.
            if "hx-request" in request.headers:
                return Response(headers={"HX-Redirect": "/login"})
            return RedirectResponse("/login", 303)
        return pages.show("refused.html", status=status_of(exc), message=exc.message, cure=exc.cure)

    return SecurityHeaders(app)
