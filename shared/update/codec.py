"""A difference of weights in few bytes: error feedback, top-k, gap coding, 8 bits, packing, zstandard.

What a round does not send is not lost: it is the residual, which the sender adds to its next difference.
Scales are per output channel: folding BatchNorm into convolutions spreads them over orders of magnitude.

Blob, little endian::

    magic     4   b"RFU1"
    schema   32   SHA-256 of the layout (names and shapes)
    body      .   one zstandard frame that states its content size; for each tensor of the layout in order:
        count     4   uint32 values kept, 0..size
        bits      1   uint8 width of a gap's remainder, count * bits <= size; absent when count is 0 or size
        unary     4   uint32 bytes of the unary stream that follows, then the stream; absent likewise
        remain    .   ceil(count * bits / 8) bytes of remainders; absent likewise
        scales    .   uint16 a channel: upper half of a float32, not negative, finite
        values    .   int8 a kept value, -127..127: value = code * scale of its channel
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard

from shared.errors import PeerError
from shared.update.layout import Entry, Layout, Tensors, Vector

MAGIC = b"RFU1"
HEADER_BYTES = len(MAGIC) + 32
LEVELS = 127
LEVEL_ZSTD = 9
DENSE_BELOW = 4096  # values: heads and biases are sent whole, they are few and they are what a round is about
MAX_WINDOW_BYTES = 8 * 1024 * 1024

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """`sent` is what the receiver decodes from `blob`, to the bit; `residual` is left for next time."""

    blob: bytes
    sent: dict[str, Vector]
    residual: dict[str, Vector]


def encode(delta: Tensors, residual: Tensors | None, keep: float, rng: np.random.Generator) -> Encoded:
    """Returns the coded sum of `delta` and `residual`, sending a share `keep` of each tensor's values.

    The error of a value that is sent is below one step of its channel (its largest value / 127) and zero in
    expectation; `sent + residual` is `delta` plus the old residual to within one rounding of float32.

    Args:
        delta: float32 tensors, finite.
        residual: what the sender's last call returned, same layout, or None.
        keep: share of coordinates kept in tensors of DENSE_BELOW values or more, above 0 and at most 1.
        rng: source of the stochastic rounding.

    Raises:
        PeerError: not finite, not float32, or delta and residual differ in layout.
    """
    layout = Layout.of(delta)
    layout.check(delta)
    if residual is not None:
        layout.check(residual)
    pieces: list[bytes] = []
    sent: dict[str, Vector] = {}
    left: dict[str, Vector] = {}
    for entry in layout.entries:
        total = delta[entry.name] + residual[entry.name] if residual is not None else delta[entry.name]
        if not np.isfinite(total).all():
            raise PeerError(f"{entry.name} and its residual add up beyond float32.")
        piece, decoded = _encode_tensor(total.ravel(), entry, keep, rng)
        pieces.append(piece)
        sent[entry.name] = decoded.reshape(entry.shape)
        left[entry.name] = total - sent[entry.name]
    body = zstandard.ZstdCompressor(level=LEVEL_ZSTD).compress(b"".join(pieces))
    return Encoded(MAGIC + bytes.fromhex(layout.schema) + body, sent, left)


def decode(blob: bytes, layout: Layout) -> dict[str, Vector]:
    """Returns the float32 tensors in `blob`; nothing larger than the layout itself is ever allocated.

    Raises:
        PeerError: another layout, too long, truncated, trailing bytes, or any number out of its range.
    """
    if blob[: len(MAGIC)] != MAGIC or len(blob) < HEADER_BYTES:
        raise PeerError("Not an update blob of this format.")
    if blob[len(MAGIC) : HEADER_BYTES].hex() != layout.schema:
        raise PeerError("The update speaks about other tensors than this round's.", cure="Train from the task.")
    body = _Body(_decompress(blob[HEADER_BYTES:], _longest_body(layout)))
    tensors = {entry.name: _decode_tensor(body, entry).reshape(entry.shape) for entry in layout.entries}
    body.end()
    return tensors


def _kept(size: int, keep: float) -> int:
    return size if size < DENSE_BELOW else min(size, max(1, math.ceil(size * keep)))


def _encode_tensor(total: Vector, entry: Entry, keep: float, rng: np.random.Generator) -> tuple[bytes, Vector]:
    size, kept = entry.size, _kept(entry.size, keep)
    if kept == size:
        indices = np.arange(size, dtype=np.int64)
        head = kept.to_bytes(4, "little")
    else:
        indices = np.sort(np.argpartition(np.abs(total), size - kept)[size - kept :])  # (kept,) ascending
        head = kept.to_bytes(4, "little") + _encode_gaps(indices, size)
    channel = indices // (size // entry.channels)  # (kept,) 0..channels-1
    largest = np.zeros(entry.channels, np.float32)  # (channels,)
    np.maximum.at(largest, channel, np.abs(total[indices]))
    halves = _round_up(largest / np.float32(LEVELS))  # (channels,) uint16
    scale = _widen(halves)[channel]  # (kept,)
    exact = np.divide(total[indices], scale, out=np.zeros(kept, np.float32), where=scale > 0)  # -127..127
    codes = np.clip(np.floor(exact + rng.random(kept, np.float32)), -LEVELS, LEVELS).astype(np.int8)  # (kept,)
    decoded = np.zeros(size, np.float32)
    decoded[indices] = codes * scale
    return head + halves.tobytes() + codes.tobytes(), decoded


def _decode_tensor(body: _Body, entry: Entry) -> Vector:
    size = entry.size
    kept = body.number(4)
    if kept > size:
        raise PeerError(f"{entry.name}: {kept} values kept of {size}.")
    indices = np.arange(size, dtype=np.int64) if kept == size else _decode_gaps(body, kept, size)
    halves = np.frombuffer(body.take(2 * entry.channels), "<u2")  # (channels,)
    if (halves >= 0x7F80).any():  # sign bit, infinity or NaN
        raise PeerError(f"{entry.name}: a scale is negative or not finite.")
    codes = np.frombuffer(body.take(kept), np.int8)  # (kept,)
    if (codes == -128).any():
        raise PeerError(f"{entry.name}: a code is out of range.")
    decoded = np.zeros(size, np.float32)
    with np.errstate(over="ignore"):
        decoded[indices] = codes * _widen(halves)[indices // (size // entry.channels)]
    if not np.isfinite(decoded).all():
        raise PeerError(f"{entry.name}: a value is beyond float32.")
    return decoded


def _encode_gaps(indices: Indices, size: int) -> bytes:
    """Golomb-Rice: each gap's quotient in unary (zeros ended by a one), its remainder in `bits` bits."""
    gaps = np.diff(indices, prepend=-1) - 1  # (k,) 0..
    bits = max(0, int(math.log2(max(1.0, 0.7 * size / len(indices)))))
    quotient = gaps >> bits
    stream = np.zeros(int(quotient.sum()) + len(gaps), np.uint8)
    stream[np.cumsum(quotient + 1) - 1] = 1
    unary = np.packbits(stream).tobytes()
    remainder = ((gaps[:, None] >> np.arange(bits)) & 1).astype(np.uint8)  # (k, bits)
    return bytes([bits]) + len(unary).to_bytes(4, "little") + unary + np.packbits(remainder.ravel()).tobytes()


def _decode_gaps(body: _Body, kept: int, size: int) -> Indices:
    if kept == 0:
        return np.zeros(0, np.int64)
    bits, length = body.number(1), body.number(4)
    if kept * bits > size or length > (size + kept + 7) // 8:
        raise PeerError("A gap stream is longer than its tensor.")
    ends = np.flatnonzero(np.unpackbits(np.frombuffer(body.take(length), np.uint8)))  # (kept,)
    if len(ends) != kept:
        raise PeerError("A gap stream holds another number of gaps than it says.")
    packed = np.frombuffer(body.take((kept * bits + 7) // 8), np.uint8)
    remainder = np.unpackbits(packed)[: kept * bits].reshape(kept, bits) @ (1 << np.arange(bits, dtype=np.int64))
    quotient = np.diff(ends, prepend=-1) - 1
    indices = np.cumsum((quotient << bits) + remainder + 1) - 1  # (kept,) ascending by construction
    if indices[-1] >= size:
        raise PeerError("A gap points beyond its tensor.")
    return np.asarray(indices, np.int64)


def _round_up(values: Vector) -> npt.NDArray[np.uint16]:
    """Returns the upper halves of float32 values, rounded up so that no code passes LEVELS."""
    whole = values.view(np.uint32)
    return np.asarray(np.minimum((whole + np.uint32(0xFFFF)) >> np.uint32(16), 0x7F7F), "<u2")


def _widen(halves: npt.NDArray[np.uint16]) -> Vector:
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _longest_body(layout: Layout) -> int:
    """Returns the most bytes any honest body of this layout can have."""
    return sum(12 + 3 * entry.size // 8 + 2 * entry.channels + entry.size for entry in layout.entries)


def _decompress(frame: bytes, limit: int) -> bytes:
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if not 0 < size <= limit:  # an unstated size reads as 2^64 - 1
            raise PeerError(f"An update of {size} bytes is refused; this layout allows {limit}.")
        # One shot into a buffer of exactly the stated size: one that unpacks to more is an error, not memory.
        unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        return unpacker.decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise PeerError(f"The update cannot be unpacked: {exc}.") from exc


class _Body:
    """A cursor that never reads past the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, length: int) -> bytes:
        piece = self._data[self._at : self._at + length]
        if len(piece) != length:
            raise PeerError("The update ends too early.")
        self._at += length
        return piece

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def end(self) -> None:
        if self._at != len(self._data):
            raise PeerError("The update has trailing bytes.")
