"""Weights between rounds: safetensors, float32 where hospitals train, half precision elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cloud.objects import Objects
from shared.errors import TrustError
from shared.update.layout import Vector
from shared.wire.records import NamedFile


def read_weights(objects: Objects, digest: str) -> dict[str, Vector]:
    """Returns every tensor as float32.

    Raises:
        StateError: the store does not hold them.
        TrustError: they are not safetensors.
    """
    try:
        return {name: np.asarray(t, np.float32) for name, t in load(objects.read(digest)).items()}
    except SafetensorError as exc:
        raise TrustError(f"Object {digest[:12]} holds no weights: {exc}.") from exc


def write_weights(objects: Objects, weights: Mapping[str, Vector], trainable: Collection[str]) -> NamedFile:
    """Stores all tensors and returns what a node downloads; those not in `trainable` in half precision."""
    kept = {
        name: np.ascontiguousarray(value, np.float32 if name in trainable else np.float16)
        for name, value in sorted(weights.items())
    }
    data = save(kept)
    return NamedFile("weights.safetensors", objects.put(data), len(data))
