"""A multipart body taken apart while it arrives: python-multipart finds the parts, nothing is collected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from msgspec import Struct
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

from shared.errors import PeerError

HEADERS = 16  # of one part
HEADER_BYTES = 4096  # of one header


class PartBegins(Struct, frozen=True):
    """A part's headers are complete; names in lower case."""

    headers: dict[str, str]


class PartData(Struct, frozen=True):
    """A stretch of the part's body."""

    data: bytes


class PartEnds(Struct, frozen=True):
    """The part's body is complete."""


Event = PartBegins | PartData | PartEnds


class Incoming:
    """One multipart body. `feed` it as it arrives; `end` tells whether it was whole."""

    def __init__(self, boundary: str) -> None:
        """Raises PeerError when the boundary is none (RFC 2046 5.1.1: 1 to 70 characters)."""
        if not 0 < len(boundary) <= 70 or not boundary.isascii() or not boundary.isprintable():
            raise PeerError("The body has no boundary.", cure="Name it in the Content-Type.")
        self._events: list[Event] = []
        self._headers: dict[str, str] = {}
        self._name, self._value = b"", b""
        self._ended = False
        callbacks: dict[str, Callable[..., None]] = {
            "on_part_begin": self._headers.clear,
            "on_header_field": self._on_name,
            "on_header_value": self._on_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_data,
            "on_part_end": lambda: self._events.append(PartEnds()),
            "on_end": self._on_end,
        }
        self._parser = MultipartParser(
            boundary, cast(Any, callbacks), max_header_count=HEADERS, max_header_size=HEADER_BYTES
        )

    def feed(self, data: bytes) -> list[Event]:
        """Returns what `data` brought.

        Raises:
            PeerError: this is no multipart body, or a header is too long.
        """
        self._events = []
        try:
            self._parser.write(data)
        except FormParserError as exc:
            raise PeerError("The body is not a multipart body.") from exc
        return self._events

    def end(self) -> None:
        """Raises PeerError when the closing boundary has not come."""
        if not self._ended:
            raise PeerError("The body ends before its closing boundary.")

    def _on_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.decode("latin-1").strip().lower()] = self._value.decode("latin-1").strip()
        self._name, self._value = b"", b""

    def _on_headers_finished(self) -> None:
        self._events.append(PartBegins(dict(self._headers)))

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        self._events.append(PartData(data[start:end]))

    def _on_end(self) -> None:
        self._ended = True
