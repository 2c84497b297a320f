"""Confirmed cases as arrays. The case store belongs to the pipeline; this reads it and never writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge.sqlite import open_foreign
from shared.errors import StateError
from shared.package.manifest import Head


@dataclass(frozen=True)
class Cases:
    """Cases of one or more heads in the order of their pseudonyms.

    `images` uint8 (N, H, W) as `shared.package.input_spec.to_model_input` made them; `heads` int64 (N,) index
    into the manifest's heads; `labels` int64 (N,) index into that head's classes; `phantom` bool (N,).
    """

    names: tuple[str, ...]
    images: npt.NDArray[np.uint8]
    heads: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    phantom: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.names)

    def of(self, head: int) -> Cases:
        """Returns the cases of one head."""
        rows = np.flatnonzero(self.heads == head)
        names = tuple(self.names[i] for i in rows)
        return Cases(names, self.images[rows], self.heads[rows], self.labels[rows], self.phantom[rows])


def read_cases(path: Path, heads: Sequence[Head], *, held_out: bool) -> Cases:
    """Returns the confirmed cases that are (or are not) held out, of the heads given.

    A case of a head that the package does not have, or with a label beyond the head's classes, is of an older
    package and is left out.

    Raises:
        StateError: the store cannot be read or an image has not the size of its head's input.
    """
    known = {head.name: index for index, head in enumerate(heads)}
    sides = {(head.input.height, head.input.width) for head in heads}
    if len(sides) != 1:
        raise StateError("The heads of this package do not share one input size.")
    height, width = sides.pop()
    names, images, columns = [], [], []
    connection = open_foreign(path)
    if connection is not None:
        query = 'SELECT * FROM cases WHERE held_out = ? ORDER BY "case"'
        with connection:
            rows = connection.execute(query, (held_out,)).fetchall()
        connection.close()
        for row in rows:
            index = known.get(row["head"])
            if index is None or not 0 <= row["label"] < len(heads[index].classes):
                continue
            if len(row["image"]) != height * width:
                raise StateError(f"A stored case has {len(row['image'])} pixels, not {height * width}.")
            names.append(str(row["case"]))
            images.append(np.frombuffer(row["image"], np.uint8).reshape(height, width))
            columns.append((index, int(row["label"]), bool(row["phantom"])))
    stacked = np.stack(images) if images else np.zeros((0, height, width), np.uint8)
    table = np.array(columns, np.int64).reshape(-1, 3)
    return Cases(tuple(names), stacked, table[:, 0], table[:, 1], table[:, 2].astype(bool))
