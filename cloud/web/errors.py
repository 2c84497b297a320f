"""One answer for every refusal: JSON for scripts and nodes, a page for people."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from cloud.web.session import SignInNeededError
from shared.errors import RadfleetError
from shared.log import get_logger
from shared.serve import status_of


def refuse_as_json(app: FastAPI) -> None:
    """Makes `app` answer a RadfleetError with its message, its cure and the status of its family."""

    @app.exception_handler(RadfleetError)
    async def _refuse(request: Request, exc: RadfleetError) -> JSONResponse:
        get_logger().warning("web.refused", path=request.url.path, reason=exc.message)
        status = 401 if isinstance(exc, SignInNeededError) else status_of(exc)
        return JSONResponse({"error": exc.message, "cure": exc.cure}, status)
