"""The reading page's application: pages, the JSON interface, and one answer for every refusal."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from edge.web.api import api_router
from edge.web.labels import Labels
from edge.web.session import Gatekeeper, SignInNeededError
from edge.web.studies import NoSuchAnswerError, Studies
from shared.clock import Clock
from shared.errors import RadfleetError
from shared.log import get_logger
from shared.serve import SecurityHeaders, status_of


def web_app(studies: Studies, labels: Labels, clock: Clock) -> SecurityHeaders:
    """Returns the application of the reading page."""
    app = FastAPI(openapi_url=None)
    keeper = Gatekeeper(labels, clock)
    app.include_router(api_router(studies, labels, keeper))

    @app.exception_handler(RadfleetError)
    async def refuse(request: Request, exc: RadfleetError) -> Response:
        if isinstance(exc, SignInNeededError):
            return JSONResponse({"error": exc.message, "cure": exc.cure}, 401)
        get_logger().warning("web.refused", reason=exc.message)
        status = 404 if isinstance(exc, NoSuchAnswerError) else status_of(exc)
        return JSONResponse({"error": exc.message, "cure": exc.cure}, status)

    return SecurityHeaders(app)
