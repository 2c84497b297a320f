"""One JSON line an event on standard error; fields that name a patient are refused, not masked."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO, cast

import structlog

# A log line is read by people who have no right to the record. Field names are compared without case,
# underscores or blanks, so PatientName, patient_name and "Patient Name" are one.
REFUSED_FIELDS = frozenset(
    {
        "accessionnumber", "birthdate", "issuerofpatientid", "mrn", "otherpatientids", "otherpatientnames",
        "patient", "patientaddress", "patientage", "patientbirthdate", "patientcomments", "patientid",
        "patientname", "patientsex", "physician", "referringphysicianname", "dataset", "pixeldata",
    }
)  # fmt: skip


class RefusedFieldError(ValueError):
    """A log call named a field that could identify a patient: the call is a defect."""


def refuse_patient_fields(
    _logger: object, _method: str, event: MutableMapping[str, Any]
) -> Mapping[str, Any] | str | bytes | bytearray | tuple[Any, ...]:
    """Passes the event on, or raises RefusedFieldError when a field name stands for patient data."""
    for field in event:
        if "".join(c for c in field.casefold() if c.isalnum()) in REFUSED_FIELDS:
            raise RefusedFieldError(f"The field {field!r} may not be logged: it can name a patient.")
    return event


class _Forgiving:
    """A stream whose lines may get lost: a log on a full disk must not end what it tells of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def configure(process: str, **fields: str) -> None:
    """Sets up JSON lines on standard error for one process; `fields` (site, node) stand on every line."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            refuse_patient_fields,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(file=cast(TextIO, _Forgiving(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(process=process, **fields)
    # Third-party libraries log through the standard library: warnings only, and never a data set.
    logging.basicConfig(
        level=logging.WARNING,
        stream=sys.stderr,
        format='{"level": "%(levelname)s", "logger": "%(name)s", "event": %(message)r}',
    )
    logging.getLogger("pynetdicom").setLevel(logging.ERROR)
    logging.getLogger("pydicom").setLevel(logging.ERROR)


def get_logger() -> structlog.stdlib.BoundLogger:
    """Returns the process's logger."""
    logger: structlog.stdlib.BoundLogger = structlog.get_logger()
    return logger
