"""The JSON interface for scripts: what the pages do, under /api, with a bearer token."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Engine

from cloud.access import audit, enrolment, people
from cloud.access.authority import Authority
from cloud.web.fleet import Deeds, list_campaigns, list_nodes, list_releases
from cloud.web.session import Gatekeeper, Signed
from shared.clock import Clock
from shared.signin import Role

AUDIT_SHOWN = 200


class Body(BaseModel):
    """A request's JSON; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Login(Body):
    name: str = Field(max_length=64)
    password: str = Field(max_length=200)


class Link(Body):
    link: str = Field(max_length=100)
    password: str = Field(max_length=200)


class Rollout(Body):
    release: int = Field(ge=1)
    nodes: list[tuple[str, str]] | None = None  # (site, node); null: all


class Rollback(Body):
    nodes: list[tuple[str, str]] | None = None


class Start(Body):
    plan: dict[str, Any] = {}  # keys of cloud.rounds.machine.Plan


class NodeInvitation(Body):
    site: str
    node: str


class PersonInvitation(Body):
    name: str
    role: Role


def api_router(engine: Engine, clock: Clock, authority: Authority, keeper: Gatekeeper, deeds: Deeds) -> APIRouter:
    """Returns the routes under /api; each names in its dependency what the person must be allowed to do."""
    router = APIRouter(prefix="/api")
    _sign_in_routes(router, engine, clock, keeper)
    _deed_routes(router, engine, keeper, deeds)

    @router.get("/nodes")
    def nodes(_: Annotated[Signed, Depends(keeper.may("fleet.read"))]) -> list[dict[str, Any]]:
        with engine.connect().execution_options(read_only=True) as conn:
            views = list_nodes(conn, clock.now())
        return [
            {
                "site": v.site,
                "node": v.node,
                "last_seen": v.last_seen.isoformat() if v.last_seen else None,
                "present": v.present,
                "moving": v.moving,
                "report": msgspec.structs.asdict(v.report)
                | {"slots": [msgspec.structs.asdict(slot) for slot in v.report.slots]}
                if v.report
                else None,
            }
            for v in views
        ]

    @router.get("/releases")
    def releases(_: Annotated[Signed, Depends(keeper.may("fleet.read"))]) -> list[dict[str, Any]]:
        with engine.connect().execution_options(read_only=True) as conn:
            return list_releases(conn)

    @router.get("/campaigns")
    def campaigns(_: Annotated[Signed, Depends(keeper.may("fleet.read"))]) -> list[dict[str, Any]]:
        with engine.connect().execution_options(read_only=True) as conn:
            return list_campaigns(conn)

    @router.get("/audit")
    def audit_log(_: Annotated[Signed, Depends(keeper.may("audit.read"))]) -> list[dict[str, Any]]:
        with engine.connect().execution_options(read_only=True) as conn:
            return [dict(row._mapping) for row in audit.newest(conn, AUDIT_SHOWN)]

    @router.post("/invitations")
    def invite_node(
        body: NodeInvitation, signed: Annotated[Signed, Depends(keeper.may("node.invite"))]
    ) -> dict[str, str]:
        with engine.begin() as conn:
            token = enrolment.invite(conn, clock, authority, body.site, body.node, actor=signed.person.name)
        return {"token": token}

    return router


def _sign_in_routes(router: APIRouter, engine: Engine, clock: Clock, keeper: Gatekeeper) -> None:
    @router.post("/login")
    def login(body: Login, request: Request) -> dict[str, str]:
        return {"token": keeper.sign_in(request, body.name, body.password, "token")}

    @router.post("/welcome")
    def welcome(body: Link) -> dict[str, str]:
        with engine.begin() as conn:
            return {"name": people.set_password(conn, clock, body.link, body.password)}

    @router.post("/people")
    def invite_person(
        body: PersonInvitation, signed: Annotated[Signed, Depends(keeper.may("people.invite"))]
    ) -> dict[str, str]:
        with engine.begin() as conn:
            link = people.invite_person(conn, clock, body.name, body.role, actor=signed.person.name)
        return {"link": link}


def _deed_routes(router: APIRouter, engine: Engine, keeper: Gatekeeper, deeds: Deeds) -> None:
    @router.post("/rollouts", status_code=202)
    def roll_out(body: Rollout, signed: Annotated[Signed, Depends(keeper.may("release.roll"))]) -> dict[str, str]:
        with engine.begin() as conn:
            deeds.roll_out(conn, body.release, body.nodes, signed.person.name)
        return {"status": "ordered"}

    @router.post("/rollbacks", status_code=202)
    def roll_back(body: Rollback, signed: Annotated[Signed, Depends(keeper.may("release.roll"))]) -> dict[str, str]:
        with engine.begin() as conn:
            deeds.roll_back(conn, body.nodes, signed.person.name)
        return {"status": "ordered"}

    @router.post("/campaigns", status_code=202)
    def start_campaign(body: Start, signed: Annotated[Signed, Depends(keeper.may("campaign.start"))]) -> dict[str, str]:
        with engine.begin() as conn:
            return {"id": deeds.start_campaign(conn, body.plan, signed.person.name)}
