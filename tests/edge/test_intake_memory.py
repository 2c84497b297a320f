"""The door's memory is bounded by a buffer, not by the object."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

from scripts.lab.child import peak_bytes
from tests.simulators.modality import phantom_study, storescu, write_files
from tests.simulators.node import make_spool

OBJECT_BYTES = 600_000_000
ALLOWED_BYTES = 50_000_000


def large_object(folder: Path) -> Path:
    """A multi-frame object whose pixels are a hole in the file."""
    item = phantom_study("chest-xray", 0, seed=1)[0]
    del item.PixelData
    item.Rows, item.Columns, item.NumberOfFrames = 1000, 1000, OBJECT_BYTES // 2_000_000
    path = write_files(folder, [item])[0]
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OW", 0, OBJECT_BYTES))
        file.truncate(file.tell() + OBJECT_BYTES)
    return path


def test_a_large_object_costs_a_buffer(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.simulators.node", "door", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        port = int(next(line for line in child.stdout if line.strip().isdigit()))
        before = peak_bytes(child.pid)
        sent = storescu(port, [large_object(tmp_path / "send")])
        assert sent.returncode == 0, sent.stderr[-500:]
        assert peak_bytes(child.pid) - before < ALLOWED_BYTES
    finally:
        child.kill()
        child.wait()
        if child.stdout:
            child.stdout.close()
    (row,) = make_spool(tmp_path).index.rows("SELECT * FROM objects")
    assert row["length"] > OBJECT_BYTES
