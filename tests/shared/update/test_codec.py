"""The update codec: what is sent plus what is left is what was meant, and no blob can hurt the reader."""

from __future__ import annotations

import resource
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PeerError
from shared.update import codec
from shared.update.codec import HEADER_BYTES, LEVELS, decode, encode
from shared.update.layout import Layout, Tensors, clip, norm


def tensors(seed: int, shapes: dict[str, tuple[int, ...]], spread: float = 1.0) -> dict[str, np.ndarray]:
    """Returns tensors whose channels differ in scale by up to e**(3 * spread)."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        value = rng.normal(size=shape) * np.exp(spread * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
        made[name] = value.astype(np.float32)
    return made


SHAPES = {
    "stage.weight": (24, 16, 5, 5),
    "stage.bias": (24,),
    "head.weight": (3, 40),
    "tokens.weight": (64, 80),
}

shape = st.lists(st.integers(1, 24), min_size=1, max_size=4).map(tuple)


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.dictionaries(st.text("abc.", min_size=1, max_size=6), shape, min_size=1, max_size=4),
    keep=st.floats(0.001, 1.0),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 4),
)
def test_receiver_gets_exactly_what_the_sender_thinks_it_sent(shapes, keep, seed, spread) -> None:
    delta, old = tensors(seed, shapes, spread), tensors(seed + 1, shapes, spread)
    coded = encode(delta, old, keep, np.random.default_rng(seed))
    received = decode(coded.blob, Layout.of(delta))
    for name, total in delta.items():
        np.testing.assert_array_equal(received[name], coded.sent[name])
        whole = total + old[name]
        rounding = 1.2e-7 * np.maximum(np.abs(received[name]), np.abs(whole)) + 1e-30
        assert (np.abs(received[name] + coded.residual[name] - whole) <= rounding).all()
        rows = whole.reshape(whole.shape[0] if whole.ndim > 1 else 1, -1)
        step = np.abs(rows).max(axis=1, keepdims=True) / LEVELS * (1 + 2**-7)  # scales are rounded up to 8 bits
        error = np.abs(received[name].reshape(rows.shape) - rows)
        assert (error[received[name].reshape(rows.shape) != 0] <= np.broadcast_to(step, rows.shape)[
            received[name].reshape(rows.shape) != 0] * 1.0001).all()  # fmt: skip


def test_a_small_channel_survives_beside_a_large_one() -> None:
    delta = {"w": np.ones((2, 100), np.float32) * np.array([[1e4], [1e-4]], np.float32)}
    received = decode(encode(delta, None, 1.0, np.random.default_rng(0)).blob, Layout.of(delta))
    np.testing.assert_allclose(received["w"], delta["w"], rtol=0.02)


def test_rounding_has_no_bias() -> None:
    delta = {"w": np.full((1, 20_001), 0.1234, np.float32)}
    delta["w"][0, 0] = 1.0
    received = decode(encode(delta, None, 1.0, np.random.default_rng(3)).blob, Layout.of(delta))
    assert abs(float(received["w"][0, 1:].mean()) - 0.1234) < 3e-5  # the step is 0.0079


def test_error_feedback_sends_everything_in_the_end() -> None:
    delta = tensors(5, SHAPES)
    nothing = {name: np.zeros_like(value) for name, value in delta.items()}
    got = {name: np.zeros_like(value) for name, value in delta.items()}
    residual, step = None, delta
    for turn in range(60):
        coded = encode(step, residual, 0.05, np.random.default_rng(turn))
        got = {name: got[name] + value for name, value in decode(coded.blob, Layout.of(delta)).items()}
        residual, step = coded.residual, nothing
    left = norm({name: delta[name] - got[name] for name in delta})
    assert left < 0.02 * norm(delta)


def test_ratio_against_fp32() -> None:
    delta = tensors(1, {"w": (256, 1024)})
    coded = encode(delta, None, 0.05, np.random.default_rng(0))
    assert 4 * 256 * 1024 / len(coded.blob) > 50


def test_another_layout_is_refused() -> None:
    blob = encode(tensors(0, SHAPES), None, 0.1, np.random.default_rng(0)).blob
    other = Layout.of(tensors(0, SHAPES | {"head.weight": (40, 3)}))
    with pytest.raises(PeerError, match="other tensors"):
        decode(blob, other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sender_refuses_what_is_not_finite(bad: float) -> None:
    delta = tensors(0, SHAPES)
    delta["head.weight"][1, 1] = bad
    with pytest.raises(PeerError, match="not finite"):
        encode(delta, None, 0.1, np.random.default_rng(0))


def body_of(delta: Tensors, keep: float = 0.1) -> bytes:
    blob = encode(delta, None, keep, np.random.default_rng(0)).blob
    return zstandard.ZstdDecompressor().decompress(blob[HEADER_BYTES:])


def blob_of(body: bytes, layout: Layout) -> bytes:
    return codec.MAGIC + bytes.fromhex(layout.schema) + zstandard.ZstdCompressor().compress(body)


class TestPoisonedBlobs:
    delta = tensors(7, SHAPES)
    layout = Layout.of(delta)
    blob = encode(delta, None, 0.1, np.random.default_rng(0)).blob
    body = body_of(delta)

    def refused(self, blob: bytes) -> None:
        tracemalloc.start()
        try:
            with pytest.raises(PeerError):
                decode(blob, self.layout)
            assert tracemalloc.get_traced_memory()[1] < 60 * self.layout.size + 200_000
        finally:
            tracemalloc.stop()

    @settings(max_examples=150, deadline=None)
    @given(cut=st.floats(0, 0.9999))
    def test_truncated_anywhere(self, cut: float) -> None:
        with pytest.raises(PeerError):
            decode(self.blob[: int(cut * len(self.blob))], self.layout)
        with pytest.raises(PeerError):
            decode(blob_of(self.body[: int(cut * len(self.body))], self.layout), self.layout)

    @settings(max_examples=300, deadline=None)
    @given(data=st.data())
    def test_garbled_anywhere(self, data: st.DataObject) -> None:
        body = bytearray(self.body)
        for _ in range(data.draw(st.integers(1, 4))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
        try:
            received = decode(blob_of(bytes(body), self.layout), self.layout)
        except PeerError:
            return
        self.layout.check(received)  # a flipped code is another number: still finite and in shape

    @settings(max_examples=100, deadline=None)
    @given(noise=st.binary(max_size=4000))
    def test_noise(self, noise: bytes) -> None:
        for blob in (noise, self.blob[:HEADER_BYTES] + noise, blob_of(noise, self.layout)):
            with pytest.raises(PeerError):
                decode(blob, self.layout)

    def test_trailing_bytes(self) -> None:
        self.refused(self.blob + b"\0")
        self.refused(blob_of(self.body + b"\0", self.layout))

    def test_zip_bomb_with_its_true_size(self) -> None:
        self.refused(blob_of(bytes(500_000_000), self.layout))

    def test_zip_bomb_that_states_a_small_size(self) -> None:
        frame = bytearray(zstandard.ZstdCompressor().compress(bytes(500_000_000)))
        small = zstandard.ZstdCompressor().compress(bytes(100_000))
        # Descriptor and content size of the small frame in front of the large frame's blocks.
        header = zstandard.frame_header_size(small)
        lying = small[:header] + bytes(frame[zstandard.frame_header_size(bytes(frame)) :])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.refused(self.blob[:HEADER_BYTES] + lying)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB

    def test_unstated_size(self) -> None:
        packer = zstandard.ZstdCompressor(write_content_size=False)
        self.refused(self.blob[:HEADER_BYTES] + packer.compress(self.body))

    def test_count_beyond_the_tensor(self) -> None:
        self.refused(blob_of((2**32 - 1).to_bytes(4, "little") + self.body[4:], self.layout))

    def test_index_beyond_the_tensor(self) -> None:
        delta = {"w": np.zeros((1, 8192), np.float32)}
        delta["w"][0, 8191] = 1.0
        layout = Layout.of(delta)
        kept = 1
        gap = codec._encode_gaps(np.array([8192]), 8192)
        body = kept.to_bytes(4, "little") + gap + b"\x00\x3f" + b"\x01"
        with pytest.raises(PeerError, match="beyond its tensor"):
            decode(blob_of(body, layout), layout)

    @pytest.mark.parametrize("half", [0x7F80, 0x7FC0, 0xBF80])  # infinity, NaN, negative
    def test_scale_out_of_range(self, half: int) -> None:
        layout = Layout.of({"b": np.zeros(3, np.float32)})
        body = (3).to_bytes(4, "little") + half.to_bytes(2, "little") + b"\1\1\1"
        with pytest.raises(PeerError, match="scale"):
            decode(blob_of(body, layout), layout)

    def test_scale_that_overflows(self) -> None:
        layout = Layout.of({"b": np.zeros(3, np.float32)})
        body = (3).to_bytes(4, "little") + (0x7F7F).to_bytes(2, "little") + b"\x7f\x7f\x7f"
        with pytest.raises(PeerError, match="beyond float32"):
            decode(blob_of(body, layout), layout)


def test_clip_bounds_the_norm_and_leaves_small_ones_alone() -> None:
    delta = tensors(2, SHAPES)
    assert norm(clip(delta, 0.5)) == pytest.approx(0.5, rel=1e-5)
    small = clip(delta, norm(delta) * 1.01)
    assert all((small[name] == delta[name]).all() for name in delta)


def test_layout_needs_every_named_tensor() -> None:
    with pytest.raises(PeerError, match="do not hold"):
        Layout.of(tensors(0, SHAPES), ["head.weight", "nobody"])
