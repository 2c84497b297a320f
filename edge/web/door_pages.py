"""The Door page: who may call, who called, what was refused, and the echo in both directions."""

import re
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Form, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from edge.web.door import Destination, Door
from edge.web.labels import Labels
from edge.web.pages import Pages
from edge.web.session import Gatekeeper, Signed
from shared.clock import Clock
from shared.errors import PeerError, RadfleetError

RECENT_S = 60.0  # an echo of the last minute is what the person at the modality has just sent
_AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e][\x20-\x5b\x5d-\x7e]{0,15}")
_HOST = re.compile(r"[0-9A-Za-z:][0-9A-Za-z.:_-]{0,254}")


def door_router(door: Door, labels: Labels, keeper: Gatekeeper, pages: Pages, clock: Clock) -> APIRouter:
    """Returns the routes of the Door page; each names in its dependency what the person must be allowed to do."""
    router = APIRouter(default_response_class=HTMLResponse)
    watcher = Annotated[Signed, Depends(keeper.may("door.read"))]
    administrator = Annotated[Signed, Depends(keeper.may("door.admit"))]

    def callers() -> dict[str, Any]:
        admitted = labels.admitted()
        let_in = {(one.ae_title, one.address) for one in admitted} | {(one.ae_title, "") for one in admitted}
        waiting = [one for one in door.callers() if not {(one.ae_title, one.address), (one.ae_title, "")} & let_in]
        return {
            "callers": waiting,
            "admitted": admitted,
            "guests": door.guests(),
            "counts": door.counts() | {"callers": len(waiting)},
            "recently": clock.now().timestamp() - RECENT_S,
            "door": door,
        }

    def page(signed: Signed, said: str = "", fault: str = "", cure: str = "") -> Response:
        reader = signed.person.may("study.read")
        values = callers() | {"said": said, "fault": fault, "cure": cure, "refused": door.refused()}
        return pages.show("door.html", signed, here="door", conflicts=door.conflicts() if reader else [], **values)

    @router.get("/door")
    def show(signed: watcher) -> Response:
        return page(signed)

    @router.get("/parts/door")
    def part(signed: watcher) -> Response:
        return pages.show("_door.html", signed, **callers())

    @router.post("/door/admit")
    def admit(
        ae_title: Annotated[str, Form(max_length=16)],
        signed: administrator,
        address: Annotated[str, Form(max_length=64)] = "",
    ) -> Response:
        labels.admit(ae_title, address, signed.person)
        return RedirectResponse("/door", 303)

    @router.post("/door/revoke")
    def revoke(
        ae_title: Annotated[str, Form(max_length=16)],
        signed: administrator,
        address: Annotated[str, Form(max_length=64)] = "",
    ) -> Response:
        labels.revoke(ae_title, address, signed.person)
        return RedirectResponse("/door", 303)

    @router.post("/door/echo")
    def echo(
        request: Request,
        signed: administrator,
        known: Annotated[str, Form(max_length=64)] = "",
        host: Annotated[str, Form(max_length=255)] = "",
        port: Annotated[str, Form(max_length=5)] = "",
        ae_title: Annotated[str, Form(max_length=16)] = "",
    ) -> Response:
        said, fault, cure = _echo(door, known, Destination("", ae_title.strip(), host.strip(), 0, tls=False), port)
        labels.record(signed.person, "door.echoed", known or f"{ae_title} at {host}:{port}")
        if "hx-request" in request.headers:
            return pages.show("_echo.html", signed, said=said, fault=fault, cure=cure)
        return page(signed, said, fault, cure)

    return router


def _echo(door: Door, known: str, typed: Destination, port: str) -> tuple[str, str, str]:
    """Returns what the page says of one echo: that it was answered, or the fault and its cure."""
    try:
        peer = next((one for one in door.destinations if one.name == known), None) if known else _checked(typed, port)
        if peer is None:
            raise PeerError(f"There is no destination {known}.")
        door.echo(peer)
    except RadfleetError as exc:
        return "", exc.message, exc.cure
    return f"{peer.ae_title} at {peer.host}:{peer.port} answered our echo.", "", ""


def _checked(typed: Destination, port: str) -> Destination:
    if not _AE_TITLE.fullmatch(typed.ae_title):
        raise PeerError("This is no AE title.", cure="Give 1 to 16 characters without a backslash.")
    if not _HOST.fullmatch(typed.host):
        raise PeerError("This is no host.", cure="Give a host name or an IP address.")
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= 65535):
        raise PeerError("This is no port.", cure="Give a number from 1 to 65535; most PACS listen on 104 or 11112.")
    return msgspec.structs.replace(typed, port=int(port))
