"""Compressed blobs: the same bytes come back, whatever they are and however cut; grouped weights are smaller."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.store.remote.bucket import Unreachable
from kittybuild.store.remote.packed import CHUNK, packed, unpacked
from tests.helpers import noise


def cut(data: bytes | memoryview, size: int) -> Iterator[memoryview]:
    return (memoryview(data)[start : start + size] for start in range(0, len(data), size))


def back(data: bytes | memoryview, nbytes: int, size: int = 1000, *, grouped: bool = True) -> bytes:
    return b"".join(unpacked(cut(data, size), nbytes, grouped=grouped))


@given(st.binary(max_size=300), st.sampled_from((1, 2, 4, 8)), st.integers(1, 50))
def test_the_same_bytes_come_back(data: bytes, element: int, size: int) -> None:
    assert back(packed(memoryview(data), element), len(data), size) == data


@pytest.mark.parametrize("nbytes", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 6])
def test_the_same_bytes_come_back_over_chunks(nbytes: int) -> None:
    data = (bytes(range(256)) * (nbytes // 256 + 1))[:nbytes]
    for element in (1, 2, 4, 8):
        parts = list(unpacked(cut(packed(memoryview(data), element), 9999), nbytes, grouped=True))
        assert b"".join(parts) == data
        assert all(len(part) <= CHUNK for part in parts)


def test_grouped_weights_are_smaller() -> None:
    import torch

    weights = noise(0, "w", (1 << 19,)).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert len(packed(memoryview(weights), 2)) < 0.75 * len(weights)
    assert len(packed(memoryview(weights), 2)) < 0.93 * len(zstandard.compress(weights, 3))


def test_it_is_zstd_that_others_can_read() -> None:
    data = bytes(range(256)) * 4
    plain = zstandard.ZstdDecompressor().stream_reader(bytes(packed(memoryview(data), 2)), read_across_frames=True)
    assert plain.read(2000) == data[::2] + data[1::2]


@pytest.mark.parametrize("grouped", [False, True])
def test_more_than_it_should_hold_is_refused(grouped: bool) -> None:
    data = bytes(1 << 20)
    bomb = packed(memoryview(data), 2) if grouped else zstandard.compress(data)
    with pytest.raises(Unreachable, match="more than it should"):
        back(bomb, 1000, grouped=grouped)


def test_what_wants_much_memory_is_refused() -> None:
    params = zstandard.ZstdCompressionParameters(window_log=27)
    greedy = zstandard.ZstdCompressor(compression_params=params).compressobj()
    data = greedy.compress(bytes(100)) + greedy.flush()
    with pytest.raises(Unreachable, match="damaged"):
        back(data, 100, grouped=False)


def test_what_is_not_grouped_is_refused() -> None:
    for data in (b"", b"\x50", zstandard.compress(b"x" * 100), packed(memoryview(b"ab"), 2)[:8].tobytes() + b"\x03"):
        with pytest.raises(Unreachable, match="does not begin as one"):
            back(data, 100)
