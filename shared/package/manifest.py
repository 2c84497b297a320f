"""The manifest of a model package: everything a node must know to run, explain, judge and trust a model.

A package is a folder named by the SHA-256 of its `manifest.json`. The manifest names every other file with length and
digest, so trusting the manifest (TUF, threshold of release officers) is trusting the package.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from shared.errors import TrustError
from shared.files import read_limited, sha256_file, sha256_hex
from shared.package.input_spec import InputSpec

MANIFEST_NAME = "manifest.json"
MANIFEST_LIMIT_BYTES = 1_000_000
FILE_LIMIT_BYTES = 256 * 1024 * 1024

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class Code(Struct, frozen=True):
    """A coded concept as DICOM writes it (PS3.3 8.8)."""

    value: str
    scheme: str  # SCT, DCM, 99RADFLEET, ...
    meaning: str


class ModelClass(Struct, frozen=True):
    """One answer a head can give: its short `name` (used in labels.csv, topics, tables) and its code."""

    name: str
    code: Code


class Scope(Struct, frozen=True):
    """Statistics of the training features of one head, for "not assessed" when a study is far from them.

    `mean` and `variance` have one value a feature; a study whose mean squared z-score exceeds `limit` is out of scope.
    """

    mean: list[float]
    variance: list[float]
    limit: float


class Head(Struct, frozen=True):
    """One reader: which studies it takes, what it answers, how its scores are calibrated.

    A study goes to the head when Modality is in `modalities` and BodyPartExamined is in `body_parts` (upper case; an
    empty BodyPartExamined is taken when `body_part_optional`) and, where present, ViewPosition is in `views`.
    `logits[offset : offset + len(classes)]` are this head's logits; softmax(logits / temperature) its probabilities.
    `normal` is the index of the class that stands for "nothing found".
    """

    name: str
    title: str  # for people: "Chest X-ray"
    modalities: list[str]
    body_parts: list[str]
    body_part_optional: bool
    views: list[str]  # empty: any view
    series: bool  # True: slices are pooled into one answer a series
    offset: int
    classes: list[ModelClass]
    normal: int
    input: InputSpec
    temperature: float
    scope: Scope | None


class PackageFile(Struct, frozen=True):
    """One file of the package."""

    name: FileName
    sha256: Sha256
    length: Annotated[int, Meta(ge=0, le=FILE_LIMIT_BYTES)]


class Variant(Struct, frozen=True):
    """One executable form of the model and how closely it must reproduce the golden outputs.

    `golden_tolerance` bounds |logit - golden logit| for this variant on another machine of the same kind.
    """

    name: str  # cpu-u8s8, cpu-fp32, cuda-fp16, tensorrt-s8s8
    file: FileName
    providers: list[str]  # ONNX Runtime execution providers, best first
    golden_tolerance: float


class Manifest(Struct, frozen=True):
    """See the module's docstring. `release` counts up and is what rollback protection compares."""

    format: int  # 1
    name: str
    release: int
    created: str  # ISO 8601 UTC
    architecture: str  # name in models/, e.g. hybrid-1
    weights: FileName  # safetensors, half precision, BatchNorm folded
    golden: FileName  # safetensors: `image` uint8 (N, H, W), `head` int64 (N,), `logits.<variant>` float32 (N, K)
    card: FileName
    feature_size: int
    heads: list[Head]
    variants: list[Variant]
    trainable: list[str]  # tensors of the weights file that a hospital may train
    files: list[PackageFile]
    provenance: dict[str, str]  # data digests, code version, seed, machine
    metrics: dict[str, float]

    def file(self, name: str) -> PackageFile:
        """Returns the entry for `name`; TrustError when the manifest does not list it."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise TrustError(f"The manifest does not name the file {name}.")

    def head(self, name: str) -> Head:
        """Returns the head called `name`; TrustError when there is none."""
        for head in self.heads:
            if head.name == name:
                return head
        raise TrustError(f"The manifest has no head {name}.")

    def variant(self, name: str) -> Variant:
        """Returns the variant called `name`; TrustError when there is none."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise TrustError(f"The manifest has no variant {name}.")


def encode_manifest(manifest: Manifest) -> bytes:
    """Returns the manifest's canonical bytes: JSON, keys in declaration order, two spaces, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes) -> Manifest:
    """Returns the manifest in `data`.

    Raises:
        TrustError: too long, not JSON, or not a manifest of format 1.
    """
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise TrustError(f"A manifest of {len(data)} bytes is refused; the limit is {MANIFEST_LIMIT_BYTES}.")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as exc:
        raise TrustError(f"Not a package manifest: {exc}.") from exc
    if manifest.format != 1:
        raise TrustError(f"Manifest format {manifest.format} is not known to this version.")
    return manifest


def verify_package(folder: Path, digest: str, *, names: Collection[str] | None = None) -> Manifest:
    """Returns the manifest of the package in `folder` after checking its bytes against `digest`.

    `names` limits the check to those files: a node holds only what its machine can run. None checks every file.

    Raises:
        TrustError: the manifest's digest differs or does not list a file of `names`, or a file is missing, of another
            length or of another digest.
    """
    data = read_limited(folder / MANIFEST_NAME, MANIFEST_LIMIT_BYTES)
    if sha256_hex(data) != digest:
        raise TrustError(f"{folder / MANIFEST_NAME} is not the manifest {digest[:12]}.")
    manifest = decode_manifest(data)
    for entry in manifest.files if names is None else [manifest.file(name) for name in names]:
        path = folder / entry.name
        if not path.is_file() or path.stat().st_size != entry.length or sha256_file(path) != entry.sha256:
            raise TrustError(f"{path} is missing or is not the file that the manifest names.")
    return manifest
