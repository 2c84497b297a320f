"""The order, names and shapes of the tensors that one update speaks about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import numpy.typing as npt

from shared.errors import PeerError
from shared.files import sha256_hex

Vector = npt.NDArray[np.float32]
Tensors = Mapping[str, Vector]


@dataclass(frozen=True)
class Entry:
    """One tensor: `shape` with the output channel first, as torch stores weights."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    @property
    def channels(self) -> int:
        """Returns its number of quantisation scales: one an output channel, one for a whole vector."""
        return self.shape[0] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class Layout:
    """Entries in the order of their names; `schema` is what both sides compare before any number is read."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, tensors: Tensors, names: Sequence[str] | None = None) -> Layout:
        """Returns the layout of `tensors`, or of those in `names`.

        Raises:
            PeerError: a name is asked for that `tensors` does not hold, or a tensor is empty.
        """
        chosen = sorted(tensors if names is None else set(names))
        missing = [name for name in chosen if name not in tensors]
        if missing or not chosen:
            raise PeerError(f"The weights do not hold the tensors {missing or '(none named)'}.")
        entries = tuple(Entry(name, tuple(int(n) for n in tensors[name].shape)) for name in chosen)
        if any(entry.size == 0 for entry in entries):
            raise PeerError("An update cannot hold an empty tensor.")
        return cls(entries)

    @cached_property
    def schema(self) -> str:
        """Returns the SHA-256 over names and shapes, lower-case hexadecimal."""
        return sha256_hex(msgspec.json.encode([(entry.name, entry.shape) for entry in self.entries]))

    @property
    def size(self) -> int:
        """Returns the number of values in all tensors."""
        return sum(entry.size for entry in self.entries)

    def check(self, tensors: Tensors) -> None:
        """Passes when `tensors` has exactly these names and shapes and holds finite float32 values only.

        Raises:
            PeerError: anything differs.
        """
        if set(tensors) != {entry.name for entry in self.entries}:
            raise PeerError("The tensors are not those of the layout.")
        for entry in self.entries:
            value = tensors[entry.name]
            if tuple(value.shape) != entry.shape or value.dtype != np.float32:
                raise PeerError(f"{entry.name} is {value.dtype}{value.shape}, the layout says {entry.shape}.")
            if not np.isfinite(value).all():
                raise PeerError(f"{entry.name} holds values that are not finite.")


def norm(tensors: Tensors) -> float:
    """Returns the L2 norm over all values, summed in double precision."""
    return math.sqrt(sum(float(np.vdot(v, v)) for v in (t.astype(np.float64).ravel() for t in tensors.values())))


def clip(tensors: Tensors, limit: float) -> dict[str, Vector]:
    """Returns the tensors scaled down so that their common L2 norm is at most `limit`."""
    length = norm(tensors)
    if length <= limit:
        return dict(tensors)
    return {name: np.asarray(value * np.float32(limit / length), np.float32) for name, value in tensors.items()}
