"""What a node and the cloud say to each other before they share a certificate: the token, and the welcome.

The rest follows EST (RFC 7030): `GET /.well-known/est/cacerts`, `POST /.well-known/est/simpleenroll` with the token's
id and secret as HTTP Basic, `POST /.well-known/est/simplereenroll` with the device certificate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta, Struct

from shared.errors import PeerError

WELCOME_PATH = "/.well-known/radfleet"
CACERTS_PATH = "/.well-known/est/cacerts"
ENROL_PATH = "/.well-known/est/simpleenroll"
RENEW_PATH = "/.well-known/est/simplereenroll"
ANSWER_LIMIT_BYTES = 1_000_000

_TOKEN = re.compile(r"([0-9a-f]{16})\.([A-Za-z0-9_-]{43})\.([0-9a-f]{64})")


@dataclass(frozen=True, repr=False)
class Token:
    """An invitation as it is handed over: `id.secret.fingerprint`, the last being the CA's (SHA-256 of its DER)."""

    id: str
    secret: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.id}.{self.secret}.{self.fingerprint}"


def parse_token(text: str) -> Token:
    """Returns the token in `text`; PeerError when it is not one."""
    match = _TOKEN.fullmatch(text.strip())
    if match is None:
        raise PeerError("This is not an enrolment token.", cure="Copy the whole line that `invite` printed.")
    return Token(*match.groups())


class Welcome(Struct, frozen=True):
    """What a node keeps of its cloud, all public; it comes over TLS that the token's fingerprint proved."""

    sign_key: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]  # raw Ed25519: receipts and desired states
    seal_key: Annotated[bytes, Meta(max_length=4_096)]  # HPKE public key
    tuf_root: Annotated[bytes, Meta(max_length=100_000)]  # root 1 of the release repository
    director_root: Annotated[bytes, Meta(max_length=100_000)]
    broker_host: Annotated[str, Meta(max_length=253)]
    broker_port: Annotated[int, Meta(ge=1, le=65535)]
    nodes_url: Annotated[str, Meta(pattern="^https://", max_length=300)]
