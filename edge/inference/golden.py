"""The golden proof: the serving session itself reproduces what the package's makers saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.numpy import load

from edge.inference.engine import Engine
from shared.errors import TrustError
from shared.files import read_limited, sha256_hex
from shared.package.manifest import Manifest


class GoldenProof(Struct, frozen=True):
    """`digest`: SHA-256 of the logits this session computed (float32 little endian, C order);
    `largest_difference`: the largest |logit - golden logit|.
    """

    digest: str
    largest_difference: float


def golden_proof(engine: Engine, folder: Path, manifest: Manifest) -> GoldenProof:
    """Returns the proof that `engine` computes what the package promises for its variant.

    Raises:
        TrustError: the session was made from other bytes, the golden file is damaged, or a logit is off
        by more than
            the variant's tolerance.
    """
    variant = manifest.variant(engine.variant)
    if engine.digest != manifest.file(variant.file).sha256:
        raise TrustError("The session was made from other weights than the manifest names.")
    entry = manifest.file(manifest.golden)
    data = read_limited(folder / manifest.golden, entry.length)
    if sha256_hex(data) != entry.sha256:
        raise TrustError("The golden file is not the one that the manifest names.")
    try:
        tensors = load(data)
        images, expected = tensors["image"], tensors[f"logits.{variant.name}"]
    except (SafetensorError, KeyError) as exc:
        raise TrustError(f"The golden file holds no outputs for {variant.name}.") from exc
    logits = np.concatenate([engine.run(image[None]).logits for image in images])  # (N, K)
    if logits.shape != expected.shape or not np.isfinite(logits).all():
        raise TrustError(f"The session gives {logits.shape} logits, the golden file has {expected.shape}.")
    largest = float(np.abs(logits - expected).max())
    if not largest <= variant.golden_tolerance:
        raise TrustError(
            f"The session differs from the golden outputs by {largest:.4g}, allowed is {variant.golden_tolerance:.4g}.",
            cure="The package or this machine's runtime is damaged: keep the previous package.",
        )
    return GoldenProof(sha256_hex(np.ascontiguousarray(logits, dtype="<f4").tobytes()), largest)
