"""Where the real DICOM objects are, and the skip for a clone that stands alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.data import data_folder

DATA = data_folder() or Path("no-data-folder")
needs_data = pytest.mark.skipif(not (DATA / "dicom").is_dir(), reason="real data is absent: no dicom folder")
