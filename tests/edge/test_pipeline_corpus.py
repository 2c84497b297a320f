"""Every real and every hostile object through spool and pipeline: each ends somewhere that an administrator can see."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import pytest

from edge.imaging.reading import Reader
from edge.intake.part import Arriving, RefusedError
from edge.results import reading
from scripts.lab.child import peak_bytes
from tests.edge.test_pipeline import Node
from tests.simulators.modality import split_file
from tests.simulators.real_data import DATA, needs_data

SECONDS = 30.0  # of one step, on a busy machine
CHILD_PEAK = 1_000_000_000  # bytes resident of the child that reads; the largest object decodes to 180 MB


@needs_data
@pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom warns of what it puts right
def test_attack_no_object_stops_the_node_and_every_one_is_accounted_for(tmp_path: Path) -> None:
    reader = Reader()
    node = Node(tmp_path, reader=reader)
    for folder in (DATA / "dicom", DATA / "dicom_hostile"):
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or path.suffix in (".md", ".csv"):
                continue
            try:
                sop_class, instance, syntax, data = split_file(path)
            except Exception:  # noqa: BLE001, S112 pydicom names no family
                continue  # no modality could send it: no meta header, or no identifiers for the command
            try:
                node.spool.store(Arriving(sop_class, instance, syntax), [data])
            except RefusedError:
                continue
    child, longest, began = reader.pid, 0.0, time.monotonic()
    while node.pipeline.step():
        longest, began = max(longest, time.monotonic() - began), time.monotonic()
    node.run(after_s=5)
    assert reader.pid == child  # no object of this collection ends it
    assert longest < SECONDS
    assert peak_bytes(child) < CHILD_PEAK
    reader.close()
    stored = node.spool.counts()["stored"]
    database = sqlite3.connect(node.results)
    ends = dict(database.execute("SELECT outcome, COUNT(*) FROM work GROUP BY outcome").fetchall())
    assert stored > 350
    # Some come under the UID of another patient's object: they wait for a person and the pipeline does not see them.
    assert sum(ends.values()) == stored - node.spool.counts()["identity_conflicts"]
    assert ends.keys() == {"answered", "slice", "unassessed", "ignored", "quarantined"}
    assert all(row.reason for row in reading.quarantine(node.results))
    assert all(row.reason or row.finding for row in node.worklist())
    documents = dict(database.execute("SELECT documents, COUNT(*) FROM answers GROUP BY documents").fetchall())
    # Two objects are of SOP classes (one private) for which highdicom knows no IOD to copy the patient module by.
    assert documents.pop("built") > 80
    assert documents == {"not built: KeyError": 2}
