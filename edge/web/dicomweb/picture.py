"""Rendered frames (PS3.18 8.3.5.1): JPEG or PNG of eight bits, windowed as the caller or the object says."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from msgspec import Struct
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi

from edge.web.dicomweb.frames import Array, Pixels, first, integer
from edge.web.dicomweb.media import Accepted, NotAcceptableError
from shared.errors import PeerError

PICTURE_SIDE = 8192  # pixels
THUMBNAIL = 128  # pixels


class Picture(Struct, frozen=True):
    """How a rendered frame is wanted (PS3.18 8.3.5.1)."""

    png: bool = False
    quality: int = 90
    window: tuple[float, float, str] | None = None  # center, width, function
    viewport: tuple[int, int] | None = None  # the picture fits into width x height
    region: tuple[float, float, float, float] | None = None  # x, y, width, height of the source


def parse_picture(given: Mapping[str, str], wanted: list[Accepted], *, thumbnail: bool) -> Picture:
    """Returns how a request wants its picture; JPEG where both are accepted.

    Raises:
        NotAcceptableError: neither JPEG nor PNG is accepted.
        PeerError: a parameter has the wrong form.
    """
    media = (kind for one in wanted for kind in ("image/jpeg", "image/png") if one.fits(kind))
    chosen = next(media, "")
    if not chosen:
        raise NotAcceptableError("Pictures are given as image/jpeg or image/png.")
    try:
        viewport, region = _viewport(given["viewport"]) if "viewport" in given else (None, None)
        return Picture(
            png=chosen == "image/png",
            quality=min(max(int(given.get("quality", 90)), 1), 100),
            window=_window(given["window"]) if "window" in given else None,
            viewport=viewport or ((THUMBNAIL, THUMBNAIL) if thumbnail else None),
            region=region,
        )
    except ValueError as exc:
        raise PeerError("quality, window or viewport has the wrong form.") from exc


def render(pixels: Pixels, number: int, picture: Picture) -> bytes:
    """Returns one frame as JPEG or PNG of eight bits, windowed as the caller or the object says.

    Raises:
        NoFrameError: there is no such frame.
        PeerError: it cannot be decoded or the picture is outside of the limits.
    """
    array = pixels.array(number)
    try:
        image = Image.fromarray(_eight_bits(array, number, pixels, picture))
    except PeerError:
        raise
    except Exception as exc:  # pydicom names no family for look-up tables that contradict themselves
        raise PeerError(f"The frame cannot be rendered: {type(exc).__name__}.") from exc
    if picture.region is not None:
        image = image.crop(_inside(picture.region, image.width, image.height))
    if picture.viewport is not None:
        scale = min(picture.viewport[0] / image.width, picture.viewport[1] / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BILINEAR if scale > 1 else Image.Resampling.BOX)
    out = io.BytesIO()
    if picture.png:
        image.save(out, "PNG", compress_level=3)
    else:
        image.save(out, "JPEG", quality=picture.quality)
    return out.getvalue()


def _eight_bits(array: Array, number: int, pixels: Pixels, picture: Picture) -> npt.NDArray[np.uint8]:
    meaning = pixels.meaning(number)
    photometric = str(meaning.get("PhotometricInterpretation", ""))
    if array.ndim == 3:
        depth = max(integer(meaning, "BitsStored", 8), 8)
        return np.asarray(array[..., :3] >> (depth - 8), dtype=np.uint8)
    if photometric == "PALETTE COLOR":
        colours = apply_color_lut(array, meaning)
        return np.asarray(colours >> (8 * (colours.dtype.itemsize - 1)), dtype=np.uint8)
    values = np.asarray(apply_modality_lut(array, meaning))
    window = picture.window or _own_window(meaning)
    if picture.window is None and meaning.get("VOILUTSequence"):
        mapped = np.asarray(apply_voi(values, meaning), dtype=np.float32)
        unit = mapped / max(float(mapped.max(initial=0)), 1.0)
    elif window is not None:
        unit = _windowed(values.astype(np.float32), *window)
    else:
        low, high = np.percentile(values, [0.5, 99.5])
        unit = np.clip((values.astype(np.float32) - low) / max(high - low, 1e-6), 0.0, 1.0)
    if photometric == "MONOCHROME1":
        unit = 1.0 - unit
    return np.asarray(np.rint(unit * 255.0), dtype=np.uint8)


def _own_window(meaning: Dataset) -> tuple[float, float, str] | None:
    center, width = first(meaning.get("WindowCenter")), first(meaning.get("WindowWidth"))
    if center is None or width is None or float(width) <= 0:
        return None
    return float(center), float(width), str(meaning.get("VOILUTFunction") or "LINEAR").lower().replace("_", "-")


def _windowed(values: npt.NDArray[np.float32], center: float, width: float, function: str) -> npt.NDArray[np.float32]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3: to 0..1."""
    if function == "sigmoid":
        unit = 1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - center) / width, -60.0, 60.0)))
    elif function == "linear-exact":
        unit = (values - center) / width + 0.5
    else:
        unit = (values - (center - 0.5)) / max(width - 1.0, 1e-6) + 0.5
    return np.asarray(np.clip(unit, 0.0, 1.0), dtype=np.float32)


def _window(text: str) -> tuple[float, float, str]:
    center, width, function = [*text.split(","), "linear"][:3]
    if not (abs(float(center)) < 1e9 and 0 < float(width) < 1e9):
        raise ValueError(text)
    return float(center), float(width), function.lower()


def _viewport(text: str) -> tuple[tuple[int, int], tuple[float, float, float, float] | None]:
    sides = [float(part or 0) for part in text.split(",")]
    if len(sides) not in {2, 6} or not all(1 <= side <= PICTURE_SIDE for side in sides[:2]):
        raise ValueError(text)
    x, y, width, height = sides[2:] or (0.0, 0.0, 0.0, 0.0)
    return (int(sides[0]), int(sides[1])), (x, y, width, height) if width > 0 and height > 0 else None


def _inside(region: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """A source region as left, upper, right, lower within the frame; at least one pixel."""
    left, upper = int(min(max(region[0], 0), width - 1)), int(min(max(region[1], 0), height - 1))
    right, lower = int(min(region[0] + region[2], width)), int(min(region[1] + region[3], height))
    return left, upper, max(right, left + 1), max(lower, upper + 1)
