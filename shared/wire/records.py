"""Records that cross the wire, as msgspec Structs. No field can hold a pixel or an identifier of a patient.

Up: FeatureBatch, ModelUpdate, Judgement, NodeReport (each the body of a sealed envelope).
Down: Receipt, Desired (each the payload of a document signed by the cloud).
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

SiteName = Annotated[str, Meta(pattern="^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")]
Hex64 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Pseudonym = Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]  # HMAC-SHA256 under the site key, first 16 bytes

UpStage = Literal["features", "update", "judgement", "report"]
DownStage = Literal["receipt", "desired"]


class FeatureRow(Struct, frozen=True, array_like=True):
    """One confirmed study: pseudonymous case, the head that read it, confirmed class, embedding."""

    case: Pseudonym
    head: str
    label: int  # index into the head's classes
    held_out: bool  # True: this hospital keeps the case for judging, the cloud must not train on it
    features: bytes  # float16 little endian, manifest.feature_size values


class FeatureBatch(Struct, frozen=True, array_like=True):
    """Embeddings of confirmed studies made by one package and one variant: never mixed with others."""

    package: Hex64  # digest of the manifest
    variant: str
    rows: list[FeatureRow]


class ModelUpdate(Struct, frozen=True, array_like=True):
    """What one hospital learned in one round: an encoded difference of the trainable tensors."""

    round: str
    base: Hex64  # digest of the weights it started from
    cases: int  # weight in the average
    norm: float  # L2 norm of the decoded difference
    loss_before: float
    loss_after: float
    blob: bytes  # shared.update.codec


class HeadJudgement(Struct, frozen=True, array_like=True):
    """Paired comparison of candidate against champion on one hospital's held-out cases of one head.

    Each ratio is 0..1; intervals are 95 % paired bootstrap over patients (cases).
    `per_class` counts held-out cases.
    """

    head: str
    per_class: list[int]
    auc_champion: float
    auc_candidate: float
    auc_difference_low: float
    auc_difference_high: float
    balanced_champion: float
    balanced_candidate: float
    flipped: float  # share of answers that differ
    phantom: bool  # True when every case is a phantom: the verdict can be no better than `weak`


class Judgement(Struct, frozen=True, array_like=True):
    """A hospital's own view of a candidate; metrics travel, cases do not."""

    round: str
    champion: Hex64
    candidate: Hex64
    heads: list[HeadJudgement]


class SlotReport(Struct, frozen=True, array_like=True):
    """Where one release stands in the node's journal (shared words: see edge/slots/journal.py)."""

    package: Hex64
    release: int
    state: str
    reason: str


class NodeReport(Struct, frozen=True, array_like=True):
    """What a node really does: written by the process that serves, sent by `uplink`."""

    version: str  # radfleet version
    package: str  # digest of the manifest being served; empty when none is
    release: int
    variant: str
    weights_loaded: str  # SHA-256 of the ONNX bytes in the serving session
    golden: str  # SHA-256 of the golden outputs the serving process computed
    serving_pid: int
    provider: str
    slots: list[SlotReport]
    studies: int  # answered since the node was set up
    quarantined: int
    labelled: int
    outbox_waiting: int
    outbox_expired: int
    clock_trusted: bool


class Receipt(Struct, frozen=True, array_like=True):
    """The cloud's verdict on one message, signed; `partial` names the chunks it holds and ends nothing."""

    id: str
    verdict: Literal["accepted", "duplicate", "refused", "partial"]
    reason: str
    held: bytes  # bitmap of chunks held, least significant bit first; only for `partial`


class NamedFile(Struct, frozen=True, array_like=True):
    """A blob on the cloud's node port: GET /blobs/<sha256>, Range allowed."""

    name: str
    sha256: Hex64
    length: int


class TrainTask(Struct, frozen=True, tag="train"):
    """Train the named tensors from `weights` on the local confirmed cases and send a ModelUpdate."""

    round: str
    number: int
    package: Hex64  # the champion: its manifest names architecture, heads and inputs
    weights: NamedFile
    trainable: list[str]
    epochs: int
    learning_rate: float
    batch: int
    seed: int
    keep: float  # share of coordinates kept by top-k, 0..1
    max_norm: float
    deadline: str


class JudgeTask(Struct, frozen=True, tag="judge"):
    """Run the candidate beside the champion on the held-out cases and send a Judgement."""

    round: str
    package: Hex64  # the champion
    candidate: Hex64
    manifest: NamedFile
    model: NamedFile  # the variant's ONNX file
    variant: str
    deadline: str


class ReleaseOrder(Struct, frozen=True):
    """Install this release; the director and release metadata on the node port must both say so."""

    release: int
    package: Hex64


class Desired(Struct, frozen=True):
    """The whole state the cloud wants one node to be in; retained, signed, and always the latest `serial`."""

    node: str
    site: str
    serial: int
    issued: str
    task: TrainTask | JudgeTask | None
    order: ReleaseOrder | None
    feature_policy: Literal["off", "features"] = "features"
