"""The reference set: phantoms that the cloud calibrates on and judges with, the same for everybody who asks.

It holds no patient, so it may stand in the cloud; a gate that saw nothing else says so.
"""

from __future__ import annotations

import numpy as np

from models.data import Samples, concatenate, phantoms
from models.heads import BY_NAME

_SEED_SPACE = 1_000_000  # keeps these phantoms apart from the training, validation and test ones (seeds 1, 2, 3)


def reference_set(seed: int, n: int) -> Samples:
    """Returns `n` phantoms in all, heads in equal parts and classes in turn, on scanners as the training had them."""
    shares = [len(part) for part in np.array_split(np.arange(n), len(BY_NAME))]
    return concatenate(
        [
            phantoms(_SEED_SPACE + seed, name, share, slices=1, keep=1)  # one slice: the lesion's middle
            for name, share in zip(BY_NAME, shares, strict=True)
            if share
        ]
    )
