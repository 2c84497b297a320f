"""A modality: phantoms as DICOM files, sent with DCMTK's storescu; and a bare C-STORE for what storescu would not
send.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from datetime import datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, Association
from pynetdicom.dimse_primitives import C_STORE

from models.phantom_dicom import Subject, to_bytes, wrap_phantom
from models.phantoms import SCANNERS, draw_phantom

WHEN = datetime(2026, 1, 2, 3, 4, 5)  # noqa: DTZ001 DICOM times are local
CLEAN = next(iter(SCANNERS.values())) if isinstance(SCANNERS, dict) else SCANNERS[0]


def phantom_study(
    head: str, label: int, *, seed: int, patient: str = "P1", slices: int = 12, modality: str = ""
) -> list[FileDataset]:
    """Returns one phantom's objects; the same seed gives the same UIDs and pixels."""
    uids = random.Random(f"{head}{label}{seed}{patient}{modality}")
    phantom = draw_phantom(np.random.default_rng(seed), head, label, CLEAN, slices=slices)
    subject = Subject(patient, "DOE^JANE", "19700101", "F", f"A{seed}", "STATION1")
    return wrap_phantom(phantom, subject, new_uid=lambda: f"2.25.{uids.getrandbits(120)}", when=WHEN, modality=modality)


def write_files(folder: Path, objects: Sequence[FileDataset]) -> list[Path]:
    """Writes objects as files, named in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for item in objects:
        path = folder / f"{len(list(folder.iterdir())):05d}.dcm"
        path.write_bytes(to_bytes(item))
        paths.append(path)
    return paths


def storescu(
    port: int, paths: Sequence[Path], *options: str, calling: str = "MODALITY", called: str = "RADFLEET"
) -> subprocess.CompletedProcess[str]:
    """Sends files with DCMTK; `-R` proposes only what the files need."""
    command = [
        "storescu",
        "-v",
        "-R",
        "-aet",
        calling,
        "-aec",
        called,
        *options,
        "127.0.0.1",
        str(port),
        *map(str, paths),
    ]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "TCP_NODELAY": "1"},
        timeout=120,
        check=False,
    )


def associate(
    port: int, contexts: Sequence[tuple[str, str]], *, calling: str = "MODALITY", called: str = "RADFLEET"
) -> Association:
    """Returns an association with the given (SOP class, transfer syntax) pairs, however odd."""
    ae = AE(ae_title=calling)
    ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 30
    for sop_class, transfer_syntax in dict.fromkeys(contexts):
        ae.add_requested_context(sop_class, transfer_syntax)
    return ae.associate("127.0.0.1", port, ae_title=called)


def send_raw(association: Association, sop_class: str, sop_instance: str, transfer_syntax: str, data: bytes) -> int:
    """Sends a data set's bytes as they are under any identifiers; returns the status, -1 when none came."""
    context = next(
        c
        for c in association.accepted_contexts
        if c.abstract_syntax == sop_class and c.transfer_syntax[0] == transfer_syntax
    )
    request = C_STORE()
    request.MessageID = 1
    request.AffectedSOPClassUID = sop_class
    request.AffectedSOPInstanceUID = sop_instance
    request.Priority = 2
    request.DataSet = BytesIO(data)
    association._reactor_checkpoint.clear()
    association.dimse.send_msg(request, context.context_id)
    _, response = association.dimse.get_msg(block=True)
    association._reactor_checkpoint.set()
    return -1 if response is None or response.Status is None else int(response.Status)


def encoded(item: Dataset, *, implicit: bool = False) -> bytes:
    """Returns the data set's own bytes, without file meta."""
    buffer = pydicom.filebase.DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, implicit
    pydicom.filewriter.write_dataset(buffer, item)
    return buffer.getvalue()


def split_file(path: Path) -> tuple[str, str, str, bytes]:
    """Returns SOP class, SOP instance, transfer syntax and the data set's bytes of a DICOM file with meta header."""
    data = path.read_bytes()
    with path.open("rb") as file:
        pydicom.filereader.read_preamble(file, force=False)
        meta = pydicom.filereader._read_file_meta_info(file)
        offset = file.tell()
    item = pydicom.dcmread(path, stop_before_pixels=True)
    return str(item.SOPClassUID), str(item.SOPInstanceUID), str(meta.TransferSyntaxUID), data[offset:]


EXPLICIT = str(ExplicitVRLittleEndian)
