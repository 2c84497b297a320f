"""How a refusal reads for scripts and nodes."""

from __future__ import annotations

from fastapi import Request
from fastapi.responses import JSONResponse

from cloud.web.session import SignInNeededError
from shared.errors import RadfleetError
from shared.log import get_logger
from shared.serve import status_of


def as_json(request: Request, exc: RadfleetError) -> JSONResponse:
    """Returns an error of ours with its message, its cure and the status of its family."""
    if not isinstance(exc, SignInNeededError):
        get_logger().warning("web.refused", path=request.url.path, reason=exc.message)
    status = 401 if isinstance(exc, SignInNeededError) else status_of(exc)
    return JSONResponse({"error": exc.message, "cure": exc.cure}, status)
