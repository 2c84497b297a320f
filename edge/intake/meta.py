"""The Part 10 header that stands before a spooled data set (PS3.10 section 7.1)."""

from __future__ import annotations

import struct

IMPLEMENTATION_UID = "2.25.326184215467394874613452637815163912417"
IMPLEMENTATION_NAME = "RADFLEET_01"


def file_meta(sop_class: str, sop_instance: str, transfer_syntax: str, calling_ae: str, called_ae: str) -> bytes:
    """Returns preamble, prefix and file meta information; identifiers as the command gave them, at most 64 characters.

    Written here and not with pydicom because it stands in the path of every object; a test reads it with pydicom.
    """
    elements = b"".join(
        (
            struct.pack("<HH2sHI", 0x0002, 0x0001, b"OB", 0, 2) + b"\0\1",
            _text(0x0002, "UI", sop_class),
            _text(0x0003, "UI", sop_instance),
            _text(0x0010, "UI", transfer_syntax),
            _text(0x0012, "UI", IMPLEMENTATION_UID),
            _text(0x0013, "SH", IMPLEMENTATION_NAME),
            _text(0x0016, "AE", calling_ae) if calling_ae else b"",
            _text(0x0018, "AE", called_ae) if called_ae else b"",
        )
    )
    return b"\0" * 128 + b"DICM" + struct.pack("<HH2sHI", 0x0002, 0x0000, b"UL", 4, len(elements)) + elements


def _text(element: int, vr: str, value: str) -> bytes:
    data = value[:64].encode("ascii", "replace")
    if len(data) % 2:
        data += b"\0" if vr == "UI" else b" "
    return struct.pack("<HH2sH", 0x0002, element, vr.encode(), len(data)) + data
