"""What the pipeline keeps: the schema of results.sqlite and the records that its rows hold.

Owner: the pipeline's process. Everybody else reads (`edge/results/reading.py`). Times are seconds since
1970.
"""

from __future__ import annotations

from msgspec import Struct

from edge.imaging.read import Stack
from shared.package.input_spec import InputSpec
from shared.package.manifest import ModelClass

SCHEMA_VERSION = 3
SCHEMA = """
CREATE TABLE IF NOT EXISTS cursors (name TEXT PRIMARY KEY, value INTEGER NOT NULL);

-- One row an object of the spool, by its digest: claimed while `outcome` is empty, then done for ever.
CREATE TABLE IF NOT EXISTS work (
    digest TEXT PRIMARY KEY,
    object INTEGER NOT NULL,        -- intake's row id: a hint, it changes when intake rebuilds its index
    series TEXT NOT NULL,
    claimed_at REAL NOT NULL,
    tries INTEGER NOT NULL,
    outcome TEXT NOT NULL           -- '' leased, answered, slice, unassessed, ignored, quarantined, rule:<action>,
                                    -- gone: wanted again after it had left the spool
);
CREATE INDEX IF NOT EXISTS work_open ON work (outcome, claimed_at);
CREATE INDEX IF NOT EXISTS work_series ON work (series);

CREATE TABLE IF NOT EXISTS studies (
    study TEXT PRIMARY KEY,
    patient_name TEXT NOT NULL, patient_id TEXT NOT NULL, accession TEXT NOT NULL,
    study_date TEXT NOT NULL, description TEXT NOT NULL,
    first_stored_at REAL NOT NULL
);

-- A series while its slices come in; `pending_since` is the first slice that no answer counts yet, or NULL.
CREATE TABLE IF NOT EXISTS series (
    answer TEXT PRIMARY KEY,
    study TEXT NOT NULL, series TEXT NOT NULL, head TEXT NOT NULL, package TEXT NOT NULL,
    reason TEXT NOT NULL,           -- why no head reads it; empty when `head` is set
    subject BLOB NOT NULL,          -- Subject
    association TEXT NOT NULL,      -- the one that brought the latest slice
    pending_since REAL,
    first_received_at REAL NOT NULL,
    last_stored_at REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS series_pending ON series (pending_since);
CREATE TABLE IF NOT EXISTS slices (
    answer TEXT NOT NULL, key TEXT NOT NULL,   -- key: SOP Instance UID and frame
    record BLOB NOT NULL,                      -- SliceRecord
    association TEXT NOT NULL,
    PRIMARY KEY (answer, key)
);
-- How many objects a series is said to have: part '' is the series itself, else one of its acquisitions.
CREATE TABLE IF NOT EXISTS announced (
    series TEXT NOT NULL, part TEXT NOT NULL, count INTEGER NOT NULL, PRIMARY KEY (series, part)
);
-- Of each class the slice with the largest logit keeps its model input: one becomes the answer's image.
CREATE TABLE IF NOT EXISTS peaks (
    answer TEXT NOT NULL, class INTEGER NOT NULL, logit REAL NOT NULL, key TEXT NOT NULL, image BLOB NOT NULL,
    PRIMARY KEY (answer, class)
);

CREATE TABLE IF NOT EXISTS answers (
    answer TEXT NOT NULL, version INTEGER NOT NULL,
    latest INTEGER NOT NULL,        -- 1 for the highest version
    study TEXT NOT NULL, series TEXT NOT NULL, head TEXT NOT NULL,
    inputs TEXT NOT NULL,           -- digest over all that went in: the same inputs give no new version
    assessed INTEGER NOT NULL,      -- 0: "not assessed"
    answered_at REAL NOT NULL,
    documents TEXT NOT NULL,        -- '' to be built, built, or why they could not be
    display BLOB,                   -- PNG of the image for the page, made with the documents
    record BLOB NOT NULL,           -- AnswerRecord
    PRIMARY KEY (answer, version)
);
CREATE INDEX IF NOT EXISTS answers_open ON answers (documents);
CREATE INDEX IF NOT EXISTS answers_study ON answers (study);
CREATE INDEX IF NOT EXISTS answers_shown ON answers (answered_at) WHERE display IS NOT NULL;

CREATE TABLE IF NOT EXISTS quarantine (
    digest TEXT PRIMARY KEY, file TEXT NOT NULL, sop_instance TEXT NOT NULL, study TEXT NOT NULL,
    modality TEXT NOT NULL, calling_ae TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL
);

CREATE TABLE IF NOT EXISTS deliveries (
    sop_instance TEXT PRIMARY KEY, sop_class TEXT NOT NULL, transfer_syntax TEXT NOT NULL,
    answer TEXT NOT NULL, version INTEGER NOT NULL, kind TEXT NOT NULL,     -- report, picture
    data BLOB NOT NULL,             -- the DICOM file
    state TEXT NOT NULL,            -- waiting, sent, expired (there was no PACS)
    tries INTEGER NOT NULL, next_at REAL NOT NULL, last_error TEXT NOT NULL, sent_at REAL
);
CREATE INDEX IF NOT EXISTS deliveries_due ON deliveries (state, next_at);

-- What this process really serves, written by the process itself after its golden proof, anew at each start.
DROP TABLE IF EXISTS serving;
CREATE TABLE serving (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    pid INTEGER NOT NULL, package TEXT NOT NULL, release INTEGER NOT NULL,
    variant TEXT NOT NULL, provider TEXT NOT NULL,
    degraded TEXT NOT NULL,         -- why a better provider is not in use; empty when none is missing
    weights_loaded TEXT NOT NULL, golden TEXT NOT NULL, since REAL NOT NULL
);
"""


class Subject(Struct, frozen=True, array_like=True):
    """Whom an answer is about, as far as it is kept; `case` is the pseudonym."""

    study: str
    series: str
    modality: str
    case: str
    held_out: bool
    phantom: bool


class InputRef(Struct, frozen=True, array_like=True):
    """One object that went into an answer."""

    sop_instance: str
    sop_class: str
    digest: str
    file: str  # in the spool
    frame: int


class SliceRecord(Struct, frozen=True, array_like=True):
    """What one slice contributes; arrays are float32 little endian, empty when no head reads the series."""

    source: InputRef
    logits: bytes  # (C,)
    evidence: bytes  # (C, h, w)
    evidence_shape: tuple[int, int, int]
    features: bytes  # (D,)
    stored_at: float
    stack: Stack = Stack()


class AnswerRecord(Struct, frozen=True):
    """One version of one answer: what the page shows and what the report says.

    `image` is the model's input, uint8 (H, W). For a series it is the slice with the largest evidence for
    the chosen class, while `logits` and `features` are those of the pooled series. `timings` are
    milliseconds by stage.
    """

    answer: str
    version: int
    study: str
    series: str
    modality: str
    head: str  # empty: no head reads it
    title: str
    classes: tuple[ModelClass, ...]
    normal: int
    input: InputSpec | None
    probabilities: tuple[float, ...]
    chosen: int  # -1 when no head read it
    reason: str  # not empty: shown as "not assessed"
    distance: float
    package: str
    package_name: str
    release: int
    variant: str
    provider: str
    degraded: str
    weights: str
    inputs: tuple[InputRef, ...]
    shown: InputRef
    image: bytes
    image_shape: tuple[int, int]
    logits: bytes  # float32 (C,)
    evidence: bytes  # float32 (C, h, w) of the shown image
    evidence_shape: tuple[int, int, int]
    features: bytes  # float16 (D,)
    case: str
    held_out: bool
    phantom: bool
    conflict: bool  # other bytes were received under the same SOP Instance UID
    complete: str  # why the series was thought complete, and whether it was opened again; empty for one image
    received_at: float
    stored_at: float  # of the last image
    answered_at: float
    timings: dict[str, float]

    @property
    def assessed(self) -> bool:
        """Whether there is an answer to show."""
        return not self.reason
