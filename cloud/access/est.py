"""Enrolment over HTTP in the shape of EST (RFC 7030); the decisions are in `cloud.access.enrolment`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool

from cloud.access import enrolment
from cloud.access.authority import CSR_LIMIT_BYTES, Authority
from shared.clock import Clock
from shared.errors import PeerError, TrustError
from shared.signin import Throttle
from shared.wire.enrolment import CACERTS_PATH, ENROL_PATH, RENEW_PATH, WELCOME_PATH, Welcome

_PKCS7 = "application/pkcs7-mime; smime-type=certs-only"


def enrolment_router(engine: Engine, clock: Clock, authority: Authority, welcome: Callable[[], Welcome]) -> APIRouter:
    """Returns the routes that need no certificate: cacerts, simpleenroll and the welcome."""
    router = APIRouter()
    throttle = Throttle(clock)

    @router.get(CACERTS_PATH)
    def cacerts() -> Response:
        return _certificates([authority.certificate])

    @router.get(WELCOME_PATH)
    def welcome_document() -> Response:
        return Response(msgspec.json.encode(welcome()), media_type="application/json")

    @router.post(ENROL_PATH)
    async def simpleenroll(request: Request, basic: Annotated[HTTPBasicCredentials, Depends(HTTPBasic())]) -> Response:
        address = request.client.host if request.client else "unknown"
        throttle.check(address)
        csr = await read_request(request)
        try:
            certificate = await run_in_threadpool(
                enrolment.enrol, engine, clock, authority, basic.username, basic.password, csr
            )
        except TrustError:
            throttle.failed(address)
            raise
        return _certificates([certificate])

    return router


def renewal_router(engine: Engine, clock: Clock, authority: Authority) -> APIRouter:
    """Returns simplereenroll, for the port where the TLS layer has verified the device certificate."""
    router = APIRouter()

    @router.post(RENEW_PATH)
    async def simplereenroll(request: Request) -> Response:
        presented: bytes = request.scope["peer_certificate"]
        csr = await read_request(request)
        certificate = await run_in_threadpool(enrolment.renew, engine, clock, authority, presented, csr)
        return _certificates([certificate])

    return router


async def read_request(request: Request) -> bytes:
    """Returns the PKCS #10 request (DER) of an EST body, refusing before more than the limit is kept."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > 2 * CSR_LIMIT_BYTES:
            raise PeerError("The certificate request is too long.")
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error as exc:
        raise PeerError("The body is not Base64.") from exc


def _certificates(certificates: list[x509.Certificate]) -> Response:
    body = base64.encodebytes(pkcs7.serialize_certificates(certificates, Encoding.DER))
    return Response(body, media_type=_PKCS7, headers={"Content-Transfer-Encoding": "base64"})
