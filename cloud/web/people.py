"""The people port: pages, the JSON interface, and enrolment, which is the only part that needs no sign-in."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from sqlalchemy import Engine

from cloud.access.authority import Authority
from cloud.access.est import enrolment_router
from cloud.web.api import api_router
from cloud.web.errors import refuse_as_json
from cloud.web.fleet import Deeds
from cloud.web.session import Gatekeeper
from shared.clock import Clock
from shared.serve import SecurityHeaders
from shared.wire.enrolment import Welcome


def people_app(
    engine: Engine, clock: Clock, authority: Authority, welcome: Callable[[], Welcome], deeds: Deeds
) -> SecurityHeaders:
    """Returns the application of the people port."""
    app = FastAPI(openapi_url=None)
    refuse_as_json(app)
    keeper = Gatekeeper(engine, clock)
    app.include_router(enrolment_router(engine, clock, authority, welcome))
    app.include_router(api_router(engine, clock, authority, keeper, deeds))
    return SecurityHeaders(app)
