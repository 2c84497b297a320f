"""The pages people see: sign in, fleet, audit, nodes and people."""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from sqlalchemy import Connection, Engine

from cloud.access import audit, enrolment, people
from cloud.access.authority import Authority
from cloud.web.fleet import Deeds, NodeName, list_campaigns, list_nodes, list_releases, newest_rollout
from cloud.web.session import COOKIE, Gatekeeper, Signed, set_cookie
from shared.clock import Clock
from shared.errors import PeerError, RadfleetError, TrustError
from shared.signin import ROLES

TEMPLATES = Path(__file__).parent / "templates"
AUDIT_SHOWN = 200
_SAID = {
    "roll-out": "The release is ordered on the selected nodes, in waves.",
    "roll-out-all": "The release is ordered on every node, in waves.",
    "roll-back": "The selected nodes are ordered back.",
    "roll-back-all": "Every node is ordered back.",
    "campaign": "The campaign has begun.",
}


class Pages:
    """Renders templates with what every page shows."""

    def __init__(self) -> None:
        self._environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._environment.filters.update(ago=_ago)

    def show(self, template: str, signed: Signed | None = None, status: int = 200, **values: Any) -> HTMLResponse:
        """Returns a rendered page; `here` in `values` marks the current one."""
        base = {"person": signed.person if signed else None, "csrf": signed.mark if signed else "", "here": ""}
        return HTMLResponse(self._environment.get_template(template).render(base | values), status)


def page_router(
    engine: Engine, clock: Clock, authority: Authority, keeper: Gatekeeper, deeds: Deeds, pages: Pages
) -> APIRouter:
    """Returns the routes of the pages; each names in its dependency what the person must be allowed to do."""
    router = APIRouter(default_response_class=HTMLResponse)
    _sign_in_routes(router, engine, clock, keeper, pages)
    _invitation_routes(router, engine, clock, authority, keeper, pages)
    reader = Annotated[Signed, Depends(keeper.may("fleet.read"))]

    def fleet(chosen: list[str]) -> dict[str, Any]:
        with engine.connect().execution_options(read_only=True) as conn:
            now = clock.now()
            nodes, releases = list_nodes(conn, now), list_releases(conn)
            return {
                "nodes": nodes,
                "present": sum(one.present for one in nodes),
                "releases": releases,
                "published": [one for one in releases if one["state"] == "published"],
                "campaigns": list_campaigns(conn),
                "rollout": newest_rollout(conn),
                "chosen": chosen,
                "now": now,
            }

    @router.get("/")
    def fleet_page(signed: reader, did: str = "") -> Response:
        return pages.show("fleet.html", signed, here="fleet", said=_SAID.get(did, ""), fault="", **fleet([]))

    @router.get("/parts/fleet")
    def fleet_part(signed: reader, node: Annotated[list[str], Query()] = []) -> Response:  # noqa: B006  FastAPI copies it
        return pages.show("_fleet.html", signed, **fleet(node))

    @router.post("/deeds")
    async def do(request: Request, signed: reader) -> Response:
        form = await request.form()
        deed = str(form.get("deed", ""))
        chosen = [str(name) for name in form.getlist("node")]
        try:
            with engine.begin() as conn:
                _do(conn, deeds, signed, deed, str(form.get("release", "")), chosen)
        except (PeerError, TrustError) as exc:
            fault = f"{exc.message} {exc.cure}"
            return pages.show("fleet.html", signed, 400, here="fleet", said="", fault=fault, **fleet(chosen))
        return RedirectResponse(f"/?did={deed}", 303)

    @router.get("/audit")
    def audit_page(signed: Annotated[Signed, Depends(keeper.may("audit.read"))]) -> Response:
        with engine.connect().execution_options(read_only=True) as conn:
            rows = list(audit.newest(conn, AUDIT_SHOWN))
            fault, count, digest = "", rows[0].serial if rows else 0, ""
            try:
                count, digest = audit.verify(conn)
            except RadfleetError as exc:
                fault = exc.message
        return pages.show("audit.html", signed, here="audit", rows=rows, count=count, digest=digest, fault=fault)

    return router


def _do(conn: Connection, deeds: Deeds, signed: Signed, deed: str, release: str, chosen: list[str]) -> None:
    action: people.Action = "campaign.start" if deed == "campaign" else "release.roll"
    if not signed.person.may(action):
        raise TrustError(f"The role {signed.person.role} may not do this.", cure="Ask an administrator.")
    nodes: list[NodeName] | None = None
    if deed in {"roll-out", "roll-back"}:
        nodes = [(site, node) for site, _, node in (name.partition("/") for name in chosen)]
        if not nodes:
            raise PeerError("No node is selected.", cure="Select nodes in the table.")
    name = signed.person.name
    if deed in {"roll-out", "roll-out-all"} and release.isdecimal() and len(release) < 10:
        deeds.roll_out(conn, int(release), nodes, name)
    elif deed in {"roll-back", "roll-back-all"}:
        deeds.roll_back(conn, nodes, name)
    elif deed == "campaign":
        deeds.start_campaign(conn, {}, name)
    else:
        raise PeerError("There is no such order.", cure="Load the page again.")


def _sign_in_routes(router: APIRouter, engine: Engine, clock: Clock, keeper: Gatekeeper, pages: Pages) -> None:
    @router.get("/login")
    def login_page(name: str = "") -> Response:
        return pages.show("login.html", fault="", said="", name=name[:64])

    @router.post("/login")
    def login(
        request: Request,
        name: Annotated[str, Form(max_length=64)],
        password: Annotated[str, Form(max_length=200)],
    ) -> Response:
        try:
            session = keeper.sign_in(request, name, password, "session")
        except PeerError as exc:
            return pages.show("login.html", status=401, fault=f"{exc.message} {exc.cure}", said="", name=name)
        response = RedirectResponse("/", 303)
        set_cookie(response, session)
        return response

    @router.post("/logout")
    async def logout(request: Request) -> Response:
        signed = await keeper.signed(request)
        with engine.begin() as conn:
            people.sign_out(conn, signed.secret)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE, secure=True)
        return response

    @router.get("/welcome/{link}")
    def welcome_page(link: str) -> Response:
        with engine.connect().execution_options(read_only=True) as conn:
            owner = people.link_owner(conn, clock, link)
        return pages.show("welcome.html", status=200 if owner else 404, owner=owner, fault="")

    @router.post("/welcome/{link}")
    def welcome(
        link: str,
        password: Annotated[str, Form(max_length=200)],
        again: Annotated[str, Form(max_length=200)],
    ) -> Response:
        try:
            if password != again:
                raise PeerError("The two passwords differ.")
            with engine.begin() as conn:
                name = people.set_password(conn, clock, link, password)
        except PeerError as exc:
            with engine.connect().execution_options(read_only=True) as conn:
                owner = people.link_owner(conn, clock, link)
            return pages.show("welcome.html", status=400, owner=owner, fault=f"{exc.message} {exc.cure}")
        return pages.show("login.html", fault="", said="Your password is set. Sign in with it.", name=name)


def _invitation_routes(
    router: APIRouter, engine: Engine, clock: Clock, authority: Authority, keeper: Gatekeeper, pages: Pages
) -> None:
    inviter = Annotated[Signed, Depends(keeper.may("people.invite"))]

    def show(request: Request, signed: Signed, make: Callable[[Connection], tuple[str, str]] | None) -> Response:
        made, secret, fault = "", "", ""
        try:
            if make is not None:
                with engine.begin() as conn:
                    made, secret = make(conn)
        except PeerError as exc:
            fault = f"{exc.message} {exc.cure}"
        values = {"made": made, "secret": secret, "fault": fault, "roles": ROLES}
        url = str(request.base_url).rstrip("/")
        return pages.show("people.html", signed, 400 if fault else 200, here="people", url=url, **values)

    @router.get("/people")
    def people_page(request: Request, signed: inviter) -> Response:
        return show(request, signed, None)

    @router.post("/people/node")
    def invite_node(
        request: Request,
        signed: inviter,
        site: Annotated[str, Form(max_length=64)],
        node: Annotated[str, Form(max_length=64)],
    ) -> Response:
        def make(conn: Connection) -> tuple[str, str]:
            token = enrolment.invite(conn, clock, authority, site, node, actor=signed.person.name)
            return f"Token for {site}/{node}", token

        return show(request, signed, make)

    @router.post("/people/person")
    def invite_person(
        request: Request,
        signed: inviter,
        name: Annotated[str, Form(max_length=64)],
        role: Annotated[str, Form(max_length=16)],
    ) -> Response:
        def make(conn: Connection) -> tuple[str, str]:
            link = people.invite_person(conn, clock, name, people.role_named(role), actor=signed.person.name)
            return f"Link for {name}", str(request.base_url.replace(path=f"/welcome/{link}"))

        return show(request, signed, make)


def _ago(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return "never"
    seconds = max(0, int((now - moment).total_seconds()))
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
