"""A data set's top-level elements, and where each ends (PS3.5 section 7).

Nothing is built of what sequences hold: they are skipped, flat, by a stack of bounded depth. So time is linear in the
bytes and memory constant, whatever a sender thinks up.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from struct import Struct

from shared.errors import PeerError

ELEMENTS_LIMIT = 1_000_000  # elements, items and fragments of one data set: about a second
DEPTH_LIMIT = 100  # sequences of undefined length inside each other

PIXELS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})

_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LITTLE_ITEM = b"\xfe\xff\x00\xe0"
_UNDEFINED = 0xFFFFFFFF
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())  # a length of four bytes (PS3.5 7.1.2)


class CutError(PeerError):
    """The data set ends before its own lengths say so."""


class OddError(PeerError):
    """The data set cannot be walked further; not because it is cut."""


class Walk:
    """One walk through `data`, whose lengths and tags are little or big endian."""

    def __init__(self, data: bytes | mmap.mmap, *, little: bool) -> None:
        order = "<" if little else ">"
        self._data = data
        self._little = little
        self._size = len(data)
        self._implicit = Struct(f"{order}HHL").unpack_from
        self._explicit = Struct(f"{order}HH2sH").unpack_from
        self._long = Struct(f"{order}L").unpack_from
        tag = Struct(f"{order}HH").pack
        self._delimiters = (tag(0xFFFE, 0xE000), tag(0xFFFE, 0xE0DD))
        self._steps = 0

    def elements(self, at: int, *, implicit: bool) -> Iterator[tuple[int, int, int, int]]:
        """Yields tag, start and end of the value, and end of the element, from `at` on; all in bytes of `data`.

        Ends where fewer than eight bytes are left, or at an item delimiter that delimits no item.

        Raises:
            CutError: an element or a sequence reaches beyond the end.
            OddError: too many elements, or nested too deeply.
        """
        while self._size - at >= 8:
            tag, vr, length, value = self._header(at, implicit)
            if tag == _ITEM_END:
                return
            end = self._past_flat(tag, vr, length, value)
            at = self._past_sequence(value, implicit) if end is None else end
            yield tag, value, at - 8 if length == _UNDEFINED else at, at

    def _header(self, at: int, implicit: bool) -> tuple[int, bytes, int, int]:
        """Tag, VR (empty when implicit), length, and where the value starts."""
        self._step(at, 8)
        if not implicit:
            group, element, vr, length = self._explicit(self._data, at)
            if vr in _LONG:
                if self._size - at < 12:
                    raise CutError("The data set ends inside an element.")
                return group << 16 | element, vr, self._long(self._data, at + 8)[0], at + 12
            if b"AA" <= vr <= b"ZZ":
                return group << 16 | element, vr, length, at + 8
            # no VR at all: some writers change to implicit in the middle, and delimiters have none
        group, element, length = self._implicit(self._data, at)
        return group << 16 | element, b"", length, at + 8

    def _step(self, at: int, needed: int) -> None:
        if self._size - at < needed:
            raise CutError("The data set ends inside an element.")
        self._steps += 1
        if self._steps > ELEMENTS_LIMIT:
            raise OddError("the data set has too many elements")

    def _past(self, at: int, length: int) -> int:
        if length > self._size - at:
            raise CutError(f"An element has {max(0, self._size - at)} of {length} bytes.")
        return at + length

    def _past_flat(self, tag: int, vr: bytes, length: int, at: int) -> int | None:
        """The end of a value that starts at `at`; None where it is a sequence that must be walked."""
        if length != _UNDEFINED:
            return self._past(at, length)
        if not self._little and vr == b"UN" and self._data[at : at + 4] == _LITTLE_ITEM:
            inner = Walk(self._data, little=True)  # what UN holds is little endian, whatever is around (PS3.5 6.2.2)
            inner._steps = self._steps
            end = inner._past_sequence(at, implicit=True)
            self._steps = inner._steps
            return end
        following = self._data[at : at + 4]
        if tag not in PIXELS and (vr in {b"SQ", b"UN"} or (not vr and following in self._delimiters)):
            return None
        return self._past_fragments(at)

    def _past_sequence(self, at: int, implicit: bool) -> int:
        """The end of a sequence of undefined length whose first item starts at `at`."""
        open_ones = [(False, implicit)]  # (is it an item and not a sequence, is it implicit)
        while open_ones:
            in_item, implicit = open_ones[-1]
            if in_item:
                tag, vr, length, at = self._header(at, implicit)
                if tag == _ITEM_END:
                    open_ones.pop()
                    continue
                end = self._past_flat(tag, vr, length, at)
                if end is None:
                    open_ones.append((False, implicit))
                else:
                    at = end
            else:
                tag, length, at = self._item(at)
                if tag == _SEQUENCE_END:
                    open_ones.pop()
                elif length != _UNDEFINED:
                    at = self._past(at, length)
                else:
                    open_ones.append((True, implicit or self._looks_implicit(at)))
            if len(open_ones) > 2 * DEPTH_LIMIT:
                raise OddError("the data set has sequences nested too deeply")
        return at

    def _item(self, at: int) -> tuple[int, int, int]:
        self._step(at, 8)
        group, element, length = self._implicit(self._data, at)
        return group << 16 | element, length, at + 8

    def _looks_implicit(self, at: int) -> bool:
        vr = self._data[at + 4 : at + 6]
        return not (len(vr) == 2 and vr.isalpha() and vr.isupper())

    def _past_fragments(self, at: int) -> int:
        """The end of an encapsulated value that starts at `at` (PS3.5 A.4)."""
        start = at
        while self._size - at >= 8:
            tag, length, value = self._item(at)
            if tag == _SEQUENCE_END:
                return value
            if tag != _ITEM:
                break
            at = self._past(value, length)
        found = self._data.find(self._delimiters[1], start)  # no fragments: the first delimiter ends it
        if found < 0:
            raise CutError("The data set ends inside an element.")
        return self._past(found, 8)
