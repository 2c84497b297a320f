"""The Forwarding page: each destination's queue, what it did not take, and an administrator's click to try again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Form, Response
from fastapi.responses import RedirectResponse

from edge.forward import reading
from edge.forward.reading import Request, Requests
from edge.web.labels import Labels, Person
from edge.web.pages import Pages
from edge.web.session import Gatekeeper, Signed
from shared.errors import PeerError


@dataclass(frozen=True)
class Forwarding:
    """The page's view of forward.sqlite at `queue`, and of what rules kept from the models in results.sqlite.

    `where` gives the configured destinations by name, as text; `requests` is where the forward process looks.
    """

    queue: Path
    results: Path
    where: dict[str, str]
    requests: Requests
    labels: Labels

    def state(self) -> dict[str, Any]:
        """Returns what the page shows."""
        return {
            "destinations": reading.destinations(self.queue, self.where),
            "dead": reading.dead_letters(self.queue),
            "fetches": reading.fetches(self.queue),
            "not_read": reading.not_read(self.results),
        }

    def retry(self, by: Person, number: int, destination: str) -> None:
        """Asks for one dead object, or for all of a destination, to be tried again.

        Raises:
            PeerError: neither or both were named.
        """
        if bool(number) == bool(destination):
            raise PeerError("Name one object or one destination.", cure="Load the page again.")
        self.labels.record(by, "forward.retried", destination or f"object {number}")
        self.requests.leave(Request(by.name, "retry", [number] if number else [], destination))


def forwarding_router(forwarding: Forwarding, keeper: Gatekeeper, pages: Pages) -> APIRouter:
    """Returns the routes of the page and of its JSON."""
    router = APIRouter()
    watcher = Annotated[Signed, Depends(keeper.may("status.read"))]

    @router.get("/forwarding")
    def page(signed: watcher) -> Response:
        return pages.show("forwarding.html", signed, here="forwarding", **forwarding.state())

    @router.get("/parts/forwarding")
    def part(signed: watcher) -> Response:
        return pages.show("_forwarding.html", signed, **forwarding.state())

    @router.get("/api/forwarding")
    def as_json(_signed: watcher) -> Response:
        return Response(msgspec.json.encode(forwarding.state()), media_type="application/json")

    @router.post("/forwarding/retry")
    def retry(
        signed: Annotated[Signed, Depends(keeper.may("forward.retry"))],
        number: Annotated[int, Form(ge=0)] = 0,
        destination: Annotated[str, Form(max_length=32)] = "",
    ) -> Response:
        forwarding.retry(signed.person, number, destination)
        return RedirectResponse("/forwarding", 303)

    return router
