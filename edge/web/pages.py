"""The pages people see: sign in, worklist, study, quarantine, status, people."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from edge.results.reading import WorklistRow
from edge.web.labels import Label, Labels
from edge.web.session import COOKIE, Gatekeeper, Signed, set_cookie
from edge.web.studies import NoSuchAnswerError, Studies
from shared.errors import PeerError
from shared.signin import ROLES

TEMPLATES = Path(__file__).parent / "templates"


class Pages:
    """Renders templates with what every page shows."""

    def __init__(self, studies: Studies) -> None:
        self._studies = studies
        self._environment = Environment(
            loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._environment.filters.update(name=_name, day=_day, moment=_moment, percent=_percent, seconds=_seconds)

    def show(self, template: str, signed: Signed | None = None, status: int = 200, **values: Any) -> HTMLResponse:
        """Returns a rendered page; `here` in `values` marks the current one."""
        base = {
            "person": signed.person if signed else None,
            "csrf": signed.mark if signed else "",
            "site": self._studies.site(),
            "here": "",
        }
        return HTMLResponse(self._environment.get_template(template).render(base | values), status)


def page_router(studies: Studies, labels: Labels, keeper: Gatekeeper, pages: Pages) -> APIRouter:
    """Returns the routes of the pages; each names in its dependency what the person must be allowed to do."""
    router = APIRouter(default_response_class=HTMLResponse)
    _sign_in_routes(router, labels, keeper, pages)
    _people_routes(router, labels, keeper, pages)
    _study_routes(router, studies, labels, keeper, pages)
    reader = Annotated[Signed, Depends(keeper.may("study.read"))]
    watcher = Annotated[Signed, Depends(keeper.may("status.read"))]

    def listed() -> dict[str, Any]:
        rows = studies.worklist()
        return {"rows": rows, "open": sum(_is_open(row) for row in rows), "counts": studies.counts()}

    def state() -> dict[str, Any]:
        return {
            "counts": studies.counts(),
            "report": studies.report(),
            "link": studies.link(),
            "room": studies.room(),
            "degraded": studies.degraded(),
            "pacs": studies.pacs,
        }

    @router.get("/")
    def worklist(signed: watcher) -> Response:
        if not signed.person.may("study.read"):
            return RedirectResponse("/status", 303)
        return pages.show("worklist.html", signed, here="worklist", **listed())

    @router.get("/parts/worklist")
    def worklist_part(signed: reader) -> Response:
        return pages.show("_worklist.html", signed, **listed())

    @router.get("/quarantine")
    def quarantine(signed: reader) -> Response:
        return pages.show("quarantine.html", signed, here="quarantine", rows=studies.quarantine())

    @router.get("/status")
    def status(signed: watcher) -> Response:
        return pages.show("status.html", signed, here="status", **state())

    @router.get("/parts/status")
    def status_part(signed: watcher) -> Response:
        return pages.show("_status.html", signed, **state())

    return router


def _study_routes(router: APIRouter, studies: Studies, labels: Labels, keeper: Gatekeeper, pages: Pages) -> None:
    @router.get("/studies/{answer}")
    def study(answer: str, signed: Annotated[Signed, Depends(keeper.may("study.read"))]) -> Response:
        record = studies.answer(answer)
        rows = studies.worklist()
        row = next((row for row in rows if row.answer == answer), None)
        if row is None:
            raise NoSuchAnswerError("This answer has left the worklist.", cure="Go back to the worklist.")
        label: Label | None = labels.current().get(answer)
        chosen = record.classes[record.chosen].name if record.assessed and record.chosen >= 0 else ""
        return pages.show(
            "study.html",
            signed,
            here="worklist",
            record=record,
            row=row,
            label=label,
            withheld=studies.withheld(record),
            selected=label.label if label else chosen,
            following=_following(rows, answer),
            said="",
        )

    @router.post("/studies/{answer}/label")
    def label(
        answer: str,
        label: Annotated[str, Form(max_length=64)],
        signed: Annotated[Signed, Depends(keeper.may("study.label"))],
        then: Annotated[str, Form(max_length=64)] = "",
    ) -> Response:
        studies.label(answer, label, signed.person)
        known = then and studies.row(then)  # never a redirect to what a form made up
        return RedirectResponse(f"/studies/{then if known else answer}", 303)


def _sign_in_routes(router: APIRouter, labels: Labels, keeper: Gatekeeper, pages: Pages) -> None:
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
        set_cookie(response, session, secure=request.url.scheme == "https")
        return response

    @router.post("/logout")
    async def logout(request: Request) -> Response:
        signed = await keeper.signed(request)
        labels.sign_out(signed.secret)
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response

    @router.get("/welcome/{link}")
    def welcome_page(link: str) -> Response:
        owner = labels.link_owner(link)
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
            name = labels.set_password(link, password)
        except PeerError as exc:
            fault = f"{exc.message} {exc.cure}"
            return pages.show("welcome.html", status=400, owner=labels.link_owner(link), fault=fault)
        said = "Your password is set. Sign in with it."
        return pages.show("login.html", fault="", said=said, name=name)


def _people_routes(router: APIRouter, labels: Labels, keeper: Gatekeeper, pages: Pages) -> None:
    @router.get("/people")
    def people(signed: Annotated[Signed, Depends(keeper.may("people.invite"))]) -> Response:
        return pages.show("people.html", signed, here="people", roles=ROLES, link="", invited="", fault="")

    @router.post("/people")
    def invite(
        request: Request,
        name: Annotated[str, Form(max_length=64)],
        role: Annotated[str, Form(max_length=16)],
        signed: Annotated[Signed, Depends(keeper.may("people.invite"))],
    ) -> Response:
        link, fault = "", ""
        try:
            token = labels.invite(name, role, actor=signed.person.name)
            link = str(request.base_url.replace(path=f"/welcome/{token}"))
        except PeerError as exc:
            fault = f"{exc.message} {exc.cure}"
        status = 400 if fault else 200
        return pages.show(
            "people.html", signed, status, here="people", roles=ROLES, link=link, invited=name, fault=fault
        )


def _is_open(row: WorklistRow) -> bool:
    return not row.reason and not row.label


def _following(rows: list[WorklistRow], answer: str) -> str:
    """Returns the next answer to review below this one, else the first above it; empty when all are reviewed."""
    at = next((i for i, row in enumerate(rows) if row.answer == answer), 0)
    around = [*rows[at + 1 :], *rows[:at]]
    return next((row.answer for row in around if _is_open(row)), "")


def _name(value: str) -> str:
    """A DICOM person name (PS3.5 6.2.1) for people: family name, given names."""
    family, _, given = value.partition("=")[0].partition("^")
    return ", ".join(part for part in (family.strip(), given.replace("^", " ").strip()) if part)


def _day(value: str) -> str:
    return f"{value[:4]}-{value[4:6]}-{value[6:8]}" if len(value) == 8 and value.isdigit() else value


def _moment(value: float) -> str:
    return datetime.fromtimestamp(value, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _percent(value: float) -> str:
    return f"{value:.0%}" if 0.005 <= value < 0.995 else (">99%" if value > 0.5 else "<1%")


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
