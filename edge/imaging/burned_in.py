"""Text burned into pixels: found by a text detector, blacked where the rest of the picture is worth keeping.

The detector is PaddleOCR's PP-OCRv6 (small) detection model, which the PyPI package rapidocr carries as an ONNX file;
no code of that package runs. It marks anatomy as well, so a mark counts as text only when several like-sized characters
stand in a row in it. Ultrasound and secondary captures are blacked wherever it marks anything of
a text's size; other objects with text are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from msgspec import Struct
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from edge.imaging.read import ImageHead, check_size, describe, translated
from shared.errors import ConfigError, PeerError, TrustError
from shared.files import read_limited, sha256_hex

Grey = npt.NDArray[np.uint8]  # (H, W)
Colour = npt.NDArray[np.uint8]  # (H, W, 3)

_US = "1.2.840.10008.5.1.4.1.1."
# Screens with writing on them: blacked. Retired ultrasound classes included.
_SCREENS = {_US + one for one in ("6", "6.1", "3", "3.1", "7", "7.2", "7.3", "7.4")}
# Drawn by software from numbers: no text can be in them.
_COMPUTED = {_US + one for one in ("66.4", "66.7", "30", "481.2")}
# Straight from a detector or a reconstruction: their header's NO is believed.
_DIRECT = {
    _US + one
    for one in ("1", "1.1", "1.2", "1.3", "2", "2.1", "2.2", "4", "4.1", "4.4", "20", "128", "128.1", "130", "13.1.3")
}
_BLACKED_TRIES = 3

_MODEL_SHA256 = "090f04abcd9d9a7498bc4ebf677e4cb9bdce1fe4197ddb7e529f1ef44e1ff94f"
_MODEL_BYTES = 20_000_000  # at most
_SIDE = 1024  # pixels of the shorter side: what is smaller grows, for letters of 8 pixels
_SMALLEST = 16  # pixels of the shorter side: nothing that can be read is in less
_GROW = 2.0  # at most: more of a tiny image is blur
_LONGEST = 1600
_THRESHOLD, _SCORE = 0.2, 0.35  # of the detector's map, and of a mark's mean
_MARK, _LINE = 0.2, 0.12  # of the shorter side: no mark, and no line of text, is higher
_STROKES = 8
_CONTRAST = 40  # grey levels between characters and what is under them


class Blacked(Struct, frozen=True):
    """One rectangle of one frame (from 0), in pixels from the top left."""

    frame: int
    left: int
    top: int
    width: int
    height: int


class Mark(Struct, frozen=True):
    """What the detector marked; `text` when it surely is writing."""

    left: int
    top: int
    width: int
    height: int
    text: bool


def burned_in(dataset: Dataset, frame: int) -> str:
    """Returns why a frame (from 0) must be thought to hold burned-in text; empty when it need not.

    Raises:
        PeerError: the pixels cannot be decoded.
    """
    head = describe(dataset)
    if _says(dataset) == "YES":
        return "the header says that text is burned into the image"
    if _vouched(dataset, head):
        return ""
    for index, picture in enumerate(pictures(dataset)):
        if index == frame:
            return "text is burned into the image" if any(mark.text for mark in marks(picture)) else ""
    raise PeerError(f"There is no frame {frame + 1}.")


def clean_pixels(dataset: FileDataset) -> tuple[Blacked, ...]:
    """Blacks burned-in text in `dataset` and returns where; without text its pixels stay bit for bit.

    An object with blacked pixels is uncompressed.

    Raises:
        PeerError: there is text and it is no ultrasound image or secondary capture, or the pixels cannot be decoded,
            or the header speaks of text and none was found.
    """
    if "PixelData" not in dataset:
        return ()
    head = describe(dataset)
    said = _says(dataset)
    if not _vouched(dataset, head):
        if said == "YES" and head.sop_class not in _SCREENS:
            raise PeerError("The header says that text is burned into the image.")
        found = _clean_frames(dataset, head)
        if said == "YES" and not found:
            raise PeerError("The header says that text is burned into the image, but none was found to be blacked.")
    else:
        found = ()
    dataset.BurnedInAnnotation = "NO"
    return found


def pictures(dataset: Dataset) -> Iterator[Colour]:
    """Yields every frame as the detector sees it; PeerError when the pixels cannot be decoded."""
    for pixels in _frames(dataset, describe(dataset)):
        yield _picture(dataset, pixels)


def marks(picture: Colour) -> list[Mark]:
    """Returns what the detector marks in an 8-bit picture; what is higher than any line of text is left out."""
    height, width = picture.shape[:2]
    if min(height, width) < _SMALLEST:
        return []
    grow = min(_GROW, max(1.0, _SIDE / min(height, width)), max(_LONGEST / max(height, width), 1e-3))
    size = tuple(max(32, round(side * grow / 32) * 32) for side in (width, height))
    scaled = (cv2.resize(picture, size).astype(np.float32) / 255 - 0.5) / 0.5
    session = _session()
    likely = session.run(None, {session.get_inputs()[0].name: scaled.transpose(2, 0, 1)[None]})[0][0, 0]  # (h, w)
    spots = cv2.dilate((likely > _THRESHOLD).astype(np.uint8), np.ones((2, 2), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(spots)
    brightest, darkest = picture.max(axis=2), picture.min(axis=2)
    found = []
    for index, (x, y, w, h, area) in enumerate(stats[1:].tolist(), start=1):
        inside = labels[y : y + h, x : x + w] == index
        if area < 16 or likely[y : y + h, x : x + w][inside].mean() < _SCORE:
            continue
        rim = 0.6 * min(w, h) + 2  # the map is trained on shrunken lines
        box = _scale((x - rim, y - rim, w + 2 * rim, h + 2 * rim), width / size[0], height / size[1], (width, height))
        if box[3] <= max(_MARK * min(height, width), 12):
            line = 1.5 * box[3] <= box[2] and box[3] <= max(_LINE * min(height, width), 12)
            sure = line and any(_reads(grey, box) for grey in (brightest, darkest))
            found.append(Mark(*box, sure))
    return found


def _clean_frames(dataset: FileDataset, head: ImageHead) -> tuple[Blacked, ...]:
    blackened: list[npt.NDArray[Any]] = []
    where: list[Blacked] = []
    screen = head.sop_class in _SCREENS
    if "LUT" in str(dataset.get("PhotometricInterpretation", "")):
        raise PeerError("The pixels are in a colour space that is not looked into.")
    for index, pixels in enumerate(_frames(dataset, head)):
        done = pixels
        for _ in range(_BLACKED_TRIES):
            found = marks(_picture(dataset, done))
            text = any(mark.text for mark in found)
            if text and not screen:
                raise PeerError("Text is burned into the image.")
            if not screen or not found:
                break
            done = done.copy() if done is pixels else done
            for mark in found:
                done[mark.top : mark.top + mark.height, mark.left : mark.left + mark.width] = _black(dataset, done)
                where.append(Blacked(index, mark.left, mark.top, mark.width, mark.height))
        else:
            if any(mark.text for mark in marks(_picture(dataset, done))):
                raise PeerError("Text is burned into the image and could not be blacked.")
        if screen:
            blackened.append(done)
    if where:
        _put_pixels(dataset, np.stack(blackened))
    return tuple(where)


def _frames(dataset: Dataset, head: ImageHead) -> Iterator[npt.NDArray[Any]]:
    """Yields (H, W) or (H, W, 3) in RGB, as many as the header says, its limits checked first."""
    check_size(dataset, head)
    with translated("cannot be decoded, so it cannot be looked into for burned-in text"):
        yield from iter_pixels(dataset, raw=False, allow_excess_frames=False)


def _picture(dataset: Dataset, pixels: npt.NDArray[Any]) -> Colour:
    """8 bits and three channels; the grey levels between the darkest and the brightest pixel."""
    if dataset.get("PhotometricInterpretation") == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, dataset)
    values = pixels.astype(np.float32)
    low, high = float(values.min()), float(values.max())
    grey = np.clip((values - low) * (255 / max(high - low, 1e-6)), 0, 255).astype(np.uint8)
    return grey if grey.ndim == 3 else np.repeat(grey[..., None], 3, axis=2)


def _black(dataset: Dataset, pixels: npt.NDArray[Any]) -> Any:
    photometric = dataset.get("PhotometricInterpretation")
    if photometric == "PALETTE COLOR":
        entries = np.arange(256 if pixels.itemsize == 1 else 65536).astype(pixels.dtype)[None]
        return entries[0, int(apply_color_lut(entries, dataset)[0].astype(np.int64).sum(axis=-1).argmin())]
    return pixels.max() if photometric == "MONOCHROME1" else pixels.min() if pixels.ndim == 2 else 0


def _put_pixels(dataset: FileDataset, pixels: npt.NDArray[Any]) -> None:
    """Puts (frames, H, W) or (frames, H, W, 3) in RGB in place of the pixels, uncompressed."""
    if int(dataset.BitsAllocated) != pixels.itemsize * 8:
        raise PeerError(f"Text is burned into pixels of {dataset.BitsAllocated} bits, which are not blacked.")
    syntax = dataset.file_meta.TransferSyntaxUID
    big = syntax == ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = syntax if big else ExplicitVRLittleEndian
    for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
        if name in dataset:
            delattr(dataset, name)
    if pixels.ndim == 4:
        dataset.PhotometricInterpretation, dataset.PlanarConfiguration = "RGB", 0
    data = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes()
    dataset.PixelData = data + b"\0" * (len(data) % 2)
    dataset["PixelData"].VR = "OB" if pixels.itemsize == 1 else "OW"
    dataset["PixelData"].is_undefined_length = False


def _reads(grey: Grey, box: tuple[int, int, int, int]) -> bool:
    """Whether three like-sized characters stand out in the box, or many strokes in a long one; bright or dark."""
    x, y, w, h = box
    inside = grey[y : y + h, x : x + w]
    if min(inside.shape) < 5:
        return False
    grow = max(1, round(48 / inside.shape[0]))
    inside = cv2.resize(inside, None, fx=grow, fy=grow, interpolation=cv2.INTER_CUBIC)
    for one in (inside, 255 - inside):
        _, mask = cv2.threshold(one, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        if mask.all() or not mask.any():
            continue
        contrast = float(np.median(one[mask > 0])) - float(np.median(one[mask == 0]))
        _, _, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        marked = [(h, w) for _, _, w, h, area in stats[1:].tolist() if _like_character(w, h, area, one.shape[0])]
        middle = float(np.median([h for h, _ in marked])) if marked else 0.0
        alike = sum(0.6 * middle <= h <= 1.5 * middle for h, _ in marked)
        # Small letters run into each other: then the strokes count that a row of pixels crosses.
        crossed = np.count_nonzero(np.diff(mask > 0, axis=1), axis=1) / 2
        strokes = float(np.percentile(crossed, 75)) if box[2] >= 4 * box[3] else 0.0
        if contrast >= _CONTRAST and (alike >= 3 or strokes >= _STROKES):
            return True
    return False


def _like_character(width: int, height: int, area: int, line: int) -> bool:
    return height >= 0.2 * line and width <= 1.6 * height + 2 and area >= 0.12 * width * height


def _scale(
    box: tuple[float, float, float, float], x_scale: float, y_scale: float, size: tuple[int, int]
) -> tuple[int, int, int, int]:
    left, top = max(0, int(box[0] * x_scale)), max(0, int(box[1] * y_scale))
    right = min(size[0], int((box[0] + box[2]) * x_scale) + 1)
    bottom = min(size[1], int((box[1] + box[3]) * y_scale) + 1)
    return left, top, right - left, bottom - top


def _says(dataset: Dataset) -> str:
    return str(dataset.get("BurnedInAnnotation") or "").upper()


def _vouched(dataset: Dataset, head: ImageHead) -> bool:
    """Whether the header is enough: computed images, and acquired ones whose header says that there is no text."""
    if head.sop_class in _COMPUTED:
        return True
    return head.sop_class in _DIRECT and _says(dataset) == "NO" and "SECONDARY" not in head.kind


@cache
def _session() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    package = find_spec("rapidocr")
    if package is None or package.origin is None:
        raise ConfigError("The text detector is not installed.", cure="Install the extra edge again.")
    data = read_limited(Path(package.origin).parent / "models" / "PP-OCRv6_det_small.onnx", _MODEL_BYTES)
    if sha256_hex(data) != _MODEL_SHA256:
        raise TrustError("The text detector is not the file that was tried.", cure="Install rapidocr as pinned.")
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
