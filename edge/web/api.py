"""The JSON interface of the reading page, under /api, with a bearer token or the page's session."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from edge.results.tables import AnswerRecord
from edge.web.labels import Labels
from edge.web.session import Gatekeeper, Signed
from edge.web.studies import Studies
from shared.signin import Role

IMAGE_SECONDS = 300  # an answer's image never changes: a browser may keep it that long


class Body(BaseModel):
    """A request's JSON; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class Login(Body):
    name: str = Field(max_length=64)
    password: str = Field(max_length=200)


class Link(Body):
    link: str = Field(max_length=100)
    password: str = Field(max_length=200)


class LabelBody(Body):
    label: str = Field(max_length=64)


class PersonInvitation(Body):
    name: str
    role: Role


def api_router(studies: Studies, labels: Labels, keeper: Gatekeeper) -> APIRouter:
    """Returns the routes under /api; each names in its dependency what the person must be allowed to do."""
    router = APIRouter(prefix="/api")
    _people_routes(router, labels, keeper)
    read = Depends(keeper.may("study.read"))

    @router.get("/worklist", dependencies=[read])
    def worklist() -> Response:
        return _json(studies.worklist())

    @router.get("/answers/{answer}", dependencies=[read])
    def answer(answer: str) -> dict[str, Any]:
        return describe(studies.answer(answer))

    @router.get("/answers/{answer}/image.png", dependencies=[read])
    def image(answer: str) -> Response:
        return _png(studies.image(answer))

    @router.get("/answers/{answer}/evidence.png", dependencies=[read])
    def evidence(answer: str) -> Response:
        return _png(studies.evidence(answer))

    @router.post("/answers/{answer}/label")
    def label(
        answer: str, body: LabelBody, signed: Annotated[Signed, Depends(keeper.may("study.label"))]
    ) -> dict[str, int]:
        return {"serial": studies.label(answer, body.label, signed.person)}

    @router.get("/quarantine", dependencies=[read])
    def quarantine() -> Response:
        return _json(studies.quarantine())

    @router.get("/status", dependencies=[Depends(keeper.may("status.read"))])
    def status() -> Response:
        report = msgspec.structs.asdict(studies.report())
        report["slots"] = [msgspec.structs.asdict(slot) for slot in report["slots"]]
        return _json({"counts": studies.counts(), "report": report, "room": studies.room()})

    return router


def describe(record: AnswerRecord) -> dict[str, Any]:
    """Returns an answer as JSON values: its classes, the choice with probabilities or why there is none, its model."""
    probabilities = record.probabilities if record.assessed else [None] * len(record.classes)  # never a guess
    return {
        "answer": record.answer,
        "version": record.version,
        "study": record.study,
        "series": record.series,
        "modality": record.modality,
        "head": record.head,
        "title": record.title,
        "classes": [
            {"name": one.name, "meaning": one.code.meaning, "probability": probability}
            for one, probability in zip(record.classes, probabilities, strict=True)
        ],
        "chosen": record.classes[record.chosen].name if record.assessed and record.chosen >= 0 else "",
        "normal": record.classes[record.normal].name if record.head else "",
        "reason": record.reason,
        "complete": record.complete,
        "package": record.package,
        "release": record.release,
        "variant": record.variant,
        "degraded": record.degraded,
        "case": record.case,
        "held_out": record.held_out,
        "stored_at": record.stored_at,
        "answered_at": record.answered_at,
        "timings": record.timings,
        "notice": "Research use only, not for diagnosis",
    }


def _people_routes(router: APIRouter, labels: Labels, keeper: Gatekeeper) -> None:
    @router.post("/login")
    def login(body: Login, request: Request) -> dict[str, str]:
        return {"token": keeper.sign_in(request, body.name, body.password, "token")}

    @router.post("/welcome")
    def welcome(body: Link) -> dict[str, str]:
        return {"name": labels.set_password(body.link, body.password)}

    @router.post("/people")
    def invite(
        body: PersonInvitation, signed: Annotated[Signed, Depends(keeper.may("people.invite"))]
    ) -> dict[str, str]:
        return {"link": labels.invite(body.name, body.role, actor=signed.person.name)}


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _png(data: bytes) -> Response:
    return Response(data, media_type="image/png", headers={"Cache-Control": f"private, max-age={IMAGE_SECONDS}"})
