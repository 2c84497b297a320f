"""DICOMweb under /dicom-web (PS3.18): QIDO-RS, WADO-RS and STOW-RS over the retention window.

The node is no archive: what was evicted is gone from here too. Every route names the right it needs.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from edge.intake.handover import Handing
from edge.intake.part import Arriving
from edge.web.dicomweb.elements import encode_json
from edge.web.dicomweb.frames import NoFrameError, UndecodableError
from edge.web.dicomweb.incoming import Incoming
from edge.web.dicomweb.media import (
    DICOM,
    JSON,
    Accepted,
    NotAcceptableError,
    accepted,
    content_type,
    multipart,
    multipart_type,
)
from edge.web.dicomweb.objects import Body, bulk, frames, metadata, rendered, retrieve
from edge.web.dicomweb.picture import parse_picture
from edge.web.dicomweb.query import Level, parse
from edge.web.dicomweb.retention import Kept, NotKeptError, Retention, Uids
from edge.web.dicomweb.search import Headers, search
from edge.web.dicomweb.stow import TOTAL_BYTES, SilentError, Stow, TooMuchError, response
from edge.web.labels import Labels
from edge.web.session import Gatekeeper, Signed, SignInNeededError
from shared.errors import LinkError, PeerError, RadfleetError
from shared.serve import status_of

PREFIX = "/dicom-web"
STOW_AE_TITLE = "STOW-RS"  # what the index shows as the caller of objects that came by HTTP
STORES = 4  # STOW requests at once; the next one is asked to come again
_SERIES = "/studies/{study}/series/{series}"
_INSTANCE = _SERIES + "/instances/{instance}"


class UnsupportedTypeError(PeerError):
    """A request's body has a media type that is not taken."""


class BusyError(LinkError):
    """As many requests of this kind are under way as there may be."""


@dataclass(frozen=True)
class DicomWeb:
    """What the routes need: what is kept, the socket of the intake process, and whose viewers may ask from a browser.

    `origins` are other sites; they need a bearer token, the page's cookie is never sent from there.
    """

    retention: Retention
    handover: Path
    origins: Sequence[str] = ()


def dicomweb_router(web: DicomWeb, labels: Labels, keeper: Gatekeeper) -> APIRouter:
    """Returns the routes under /dicom-web."""
    router = APIRouter(prefix=PREFIX)
    _search_routes(router, web.retention, keeper)
    _metadata_routes(router, web.retention, keeper)
    _file_routes(router, web.retention, keeper)
    _picture_routes(router, web.retention, keeper)
    _store_routes(router, web, labels, keeper)
    return router


def refusal(exc: RadfleetError) -> Response:
    """Returns the answer to a request under /dicom-web that an error ended."""
    own: dict[type[RadfleetError], int] = {
        SignInNeededError: 401,
        NotKeptError: 404,
        NoFrameError: 404,
        NotAcceptableError: 406,
        UndecodableError: 406,
        UnsupportedTypeError: 415,
        TooMuchError: 413,
        SilentError: 408,
    }
    status = own.get(type(exc), 503 if isinstance(exc, LinkError) else status_of(exc))
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(status, {})
    body = encode_json({"error": exc.message, "cure": exc.cure})
    return Response(body, status, headers, media_type="application/json")


def _search_routes(router: APIRouter, retention: Retention, keeper: Gatekeeper) -> None:
    headers = Headers(retention)
    allowed = [Depends(keeper.may("study.read"))]

    def answer(request: Request, level: Level, within: Uids) -> Response:
        query = parse(level, request.query_params.multi_items())
        found = search(retention, headers, query, within, _base(request))
        warnings = list(query.warnings)
        if found.more:
            warnings.append("There are additional results that can be requested.")
        said = {"Warning": ", ".join(f'299 radfleet "{text}"' for text in warnings)} if warnings else {}
        if not found.results:
            return Response(status_code=204, headers=said)
        return Response(encode_json(found.results), headers=said, media_type=JSON)

    @router.get("/studies", dependencies=allowed)
    def studies(request: Request) -> Response:
        return answer(request, "studies", Uids())

    @router.get("/series", dependencies=allowed)
    def every_series(request: Request) -> Response:
        return answer(request, "series", Uids())

    @router.get("/instances", dependencies=allowed)
    def every_instance(request: Request) -> Response:
        return answer(request, "instances", Uids())

    @router.get("/studies/{study}/series", dependencies=allowed)
    def series(request: Request, study: str) -> Response:
        return answer(request, "series", Uids((study,)))

    @router.get("/studies/{study}/instances", dependencies=allowed)
    def instances_of_study(request: Request, study: str) -> Response:
        return answer(request, "instances", Uids((study,)))

    @router.get(_SERIES + "/instances", dependencies=allowed)
    def instances(request: Request, study: str, series: str) -> Response:
        return answer(request, "instances", Uids((study,), (series,)))


def _metadata_routes(router: APIRouter, retention: Retention, keeper: Gatekeeper) -> None:
    allowed = [Depends(keeper.may("study.read"))]

    def described(request: Request, *path: str) -> Response:
        if not any(one.fits(JSON) or one.fits("application/json") for one in _wanted(request)):
            raise NotAcceptableError(f"Metadata is given as {JSON}.")
        return StreamingResponse(metadata(retention, _kept(retention, path), _base(request)), media_type=JSON)

    @router.get("/studies/{study}/metadata", dependencies=allowed)
    def study_metadata(request: Request, study: str) -> Response:
        return described(request, study)

    @router.get(_SERIES + "/metadata", dependencies=allowed)
    def series_metadata(request: Request, study: str, series: str) -> Response:
        return described(request, study, series)

    @router.get(_INSTANCE + "/metadata", dependencies=allowed)
    def instance_metadata(request: Request, study: str, series: str, instance: str) -> Response:
        return described(request, study, series, instance)


def _file_routes(router: APIRouter, retention: Retention, keeper: Gatekeeper) -> None:
    allowed = [Depends(keeper.may("study.read"))]

    def whole(request: Request, *path: str) -> Response:
        return _stream(retrieve(retention, _kept(retention, path), _wanted(request)))

    @router.get("/studies/{study}", dependencies=allowed)
    def study(request: Request, study: str) -> Response:
        return whole(request, study)

    @router.get(_SERIES, dependencies=allowed)
    def series(request: Request, study: str, series: str) -> Response:
        return whole(request, study, series)

    @router.get(_INSTANCE, dependencies=allowed)
    def instance(request: Request, study: str, series: str, instance: str) -> Response:
        return whole(request, study, series, instance)

    @router.get(_INSTANCE + "/frames/{numbers}", dependencies=allowed)
    def some_frames(request: Request, study: str, series: str, instance: str, numbers: str) -> Response:
        kept = retention.one(study, series, instance)
        return _stream(frames(retention, kept, _numbers(numbers), _wanted(request)))

    @router.get(_INSTANCE + "/bulkdata/{path:path}", dependencies=allowed)
    def bulkdata(request: Request, study: str, series: str, instance: str, path: str) -> Response:
        return _stream(bulk(retention, retention.one(study, series, instance), path, _wanted(request)))


def _picture_routes(router: APIRouter, retention: Retention, keeper: Gatekeeper) -> None:
    allowed = [Depends(keeper.may("study.read"))]

    def picture(request: Request, number: int, *path: str, thumbnail: bool = False) -> Response:
        wanted = parse_picture(request.query_params, _wanted(request), thumbnail=thumbnail)
        media = "image/png" if wanted.png else "image/jpeg"
        kept = _kept(retention, path)
        if thumbnail or len(path) == 3:
            return Response(rendered(retention, kept[len(kept) // 2], number, wanted), media_type=media)
        parts = ((media, [rendered(retention, one, number, wanted)]) for one in kept)
        return StreamingResponse(multipart(parts), media_type=multipart_type(media))

    @router.get(_INSTANCE + "/frames/{number}/rendered", dependencies=allowed)
    def frame_rendered(request: Request, study: str, series: str, instance: str, number: str) -> Response:
        return picture(request, _numbers(number)[0], study, series, instance)

    @router.get(_INSTANCE + "/frames/{number}/thumbnail", dependencies=allowed)
    def frame_thumbnail(request: Request, study: str, series: str, instance: str, number: str) -> Response:
        return picture(request, _numbers(number)[0], study, series, instance, thumbnail=True)

    def study_picture(request: Request, study: str) -> Response:
        return picture(request, 1, study, thumbnail=request.url.path.endswith("/thumbnail"))

    def series_picture(request: Request, study: str, series: str) -> Response:
        return picture(request, 1, study, series, thumbnail=request.url.path.endswith("/thumbnail"))

    def instance_picture(request: Request, study: str, series: str, instance: str) -> Response:
        return picture(request, 1, study, series, instance, thumbnail=request.url.path.endswith("/thumbnail"))

    levels: dict[str, Callable[..., Response]] = {
        "/studies/{study}": study_picture,
        _SERIES: series_picture,
        _INSTANCE: instance_picture,
    }
    for path, endpoint in levels.items():
        for name in ("rendered", "thumbnail"):
            router.add_api_route(f"{path}/{name}", endpoint, dependencies=allowed, methods=["GET"])


def _store_routes(router: APIRouter, web: DicomWeb, labels: Labels, keeper: Gatekeeper) -> None:
    places = asyncio.Semaphore(STORES)
    storer = Annotated[Signed, Depends(keeper.may("study.store"))]

    async def store(request: Request, signed: Signed, study: str) -> Response:
        incoming = Incoming(_boundary(request))
        if places.locked():
            raise BusyError("Too many requests are being stored.", cure="Try again in a moment.")
        async with places:
            handing = await Handing.connect(web.handover)
            association = f"stow-{secrets.token_hex(8)}"
            address = request.client.host if request.client else ""
            stow = Stow(
                handing,
                lambda sop_class, sop_instance, syntax: Arriving(
                    sop_class,
                    sop_instance,
                    syntax,
                    calling_ae=STOW_AE_TITLE,
                    address=address,
                    association=association,
                ),
                study,
            )
            cut: PeerError | None = None
            try:
                await stow.take(request.stream(), incoming)
            except PeerError as exc:
                cut = exc
            except ClientDisconnect:
                cut = PeerError("The caller has gone.")
            finally:
                handing.close()
            stored = [one.sop_instance for one in stow.results if one.answer.stored]
            if stow.results:
                labels.record(
                    signed.person, "study.stored", f"{len(stored)} stored, {len(stow.results) - len(stored)} refused"
                )
            if cut is not None and not stored:
                raise cut
        base = _base(request)
        urls = await asyncio.to_thread(_urls, web.retention, stored, base)
        url = f"{base}/studies/{study}" if study else ""
        status, body = response(stow.results, urls, url, cut=cut is not None)
        return Response(encode_json(body), status, media_type=JSON)

    @router.post("/studies")
    async def store_any(request: Request, signed: storer) -> Response:
        return await store(request, signed, "")

    @router.post("/studies/{study}")
    async def store_study(request: Request, signed: storer, study: str) -> Response:
        return await store(request, signed, study)


def _boundary(request: Request) -> str:
    media, parameters = content_type(request.headers.get("content-type", ""))
    if media != "multipart/related" or parameters.get("type", DICOM).lower() != DICOM:
        raise UnsupportedTypeError("The body must be multipart/related of application/dicom.")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedTypeError("The body must not be compressed.")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > TOTAL_BYTES:
        raise TooMuchError(f"A request may have {TOTAL_BYTES} bytes.", cure="Send the study in several requests.")
    return parameters.get("boundary", "")


def _urls(retention: Retention, stored: list[str], base: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for start in range(0, len(stored), 500):
        for kept in retention.instances(Uids(instance=tuple(stored[start : start + 500]))):
            path = f"studies/{kept.study}/series/{kept.series}/instances/{kept.sop_instance}"
            found[kept.sop_instance] = f"{base}/{path}"
    return found


def _base(request: Request) -> str:
    return str(request.base_url).rstrip("/") + PREFIX


def _wanted(request: Request) -> list[Accepted]:
    return accepted(request.query_params.get("accept") or request.headers.get("accept", ""))


def _kept(retention: Retention, path: tuple[str, ...]) -> list[Kept]:
    found = retention.instances(Uids(*((part,) for part in path)))
    if not found:
        raise NotKeptError("Nothing of this is kept on this node.")
    return found


def _stream(body: Body) -> Response:
    return StreamingResponse(body.pieces, media_type=body.media)


def _numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts) or len(parts) > 10_000:
        raise PeerError("Frames are named by numbers with commas.")
    return [int(part) for part in parts]
