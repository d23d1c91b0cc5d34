"""FP8 with scales and MXFP4, read as the tensors that they stand for; torch's FP8 and transformers' MXFP4 agree."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.checkpoint import scaled
from kittybuild.checkpoint.folder import read_folder
from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.reading import Files, read_companion
from kittybuild.checkpoint.source import Checkpoint, Entry
from kittybuild.errors import SourceError
from kittybuild.tensors import DType, TensorSpec
from tests.helpers import noise, save_tensors, write_json, write_model

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def content(entry: Entry, step: int = 1 << 30) -> torch.Tensor:
    """A tensor, read `step` bytes at a time by a reader that has only the entry, as another process gets it."""
    entry = pickle.loads(pickle.dumps(entry))
    whole = bytearray(entry.spec.nbytes)
    with Files() as files:
        reader = files.reader(entry)
        for start in range(0, len(whole), step):
            reader.read_into(start, memoryview(whole)[start : start + step])
    dtype = getattr(torch, entry.spec.dtype.torch_name)
    return torch.frombuffer(whole, dtype=dtype).reshape(entry.spec.shape) if whole else torch.empty(entry.spec.shape)


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def by_blocks(weight: torch.Tensor, scale: torch.Tensor, *sizes: int) -> torch.Tensor:
    """The scales blown up to the weight's shape, times the weight."""
    for axis, size in enumerate(sizes):
        scale = scale.repeat_interleave(size, axis).narrow(axis, 0, weight.shape[axis])
    return weight.float() * scale.float()


def codes(*shape: int, seed: int = 1, dtype: torch.dtype = E4M3) -> torch.Tensor:
    """Every code of an FP8 dtype, at random places."""
    drawn = noise(seed, "codes", (math.prod(shape),)).mul(1e6).to(torch.int64)
    return (drawn % 256).to(torch.uint8).view(dtype).reshape(shape)


def scales(*shape: int, seed: int = 2) -> torch.Tensor:
    return noise(seed, "scales", shape).abs() / 100


def folder(path: Path, tensors: Mapping[str, torch.Tensor], config: Any = None, *, shards: int = 1) -> Checkpoint:
    config = {"model_type": "x", "torch_dtype": "bfloat16", "quantization_config": FP8} if config is None else config
    return read_folder(str(write_model(path, tensors, config, shards=shards)))


@pytest.mark.parametrize("dtype", [DType.F8_E4M3, DType.F8_E5M2])
def test_the_values_of_fp8_are_torchs(dtype: DType) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype.torch_name)).float()
    same(torch.from_numpy(scaled.values_of(dtype)), every)


@given(
    bits=st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=50), dtype=st.sampled_from(["BF16", "F16", "F32"])
)
def test_rounding_is_torchs(bits: list[int], dtype: str) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(getattr(torch, DType(dtype).torch_name))
    with np.errstate(all="ignore"):
        found = scaled.narrowed(values.copy(), DType(dtype))
    same(torch.from_numpy(found.view(np.uint8).copy()).view(expected.dtype), expected)


class TestBlocks:
    """DeepSeek's form: a float32 scale for each block of 128 x 128."""

    @pytest.mark.parametrize("shape", [(256, 384), (200, 300), (1, 128), (128, 1), (129, 127)])
    def test_each_block_has_its_scale(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        weight, scale = codes(*shape), scales(-(-shape[0] // 128), -(-shape[1] // 128))
        found = folder(tmp_path, {"w.weight": weight, "w.weight_scale_inv": scale, "n.weight": torch.ones(3)})
        assert set(found.entries) == {"w.weight", "n.weight"}
        expected = by_blocks(weight, scale, 128, 128).bfloat16()
        for step in (1 << 30, 1000, 7):
            same(content(found.entries["w.weight"], step), expected)

    @pytest.mark.parametrize(
        ("config", "blocks"),
        [
            ({**FP8, "weight_block_size": [64, 32]}, (64, 32)),
            ({"config_groups": {"group_0": {"weights": {"block_structure": [10, 40]}}}}, (10, 40)),
            ({"config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 16}}}}, (1, 16)),
        ],
        ids=str,
    )
    def test_other_blocks_are_those_of_the_config(self, tmp_path: Path, config: Any, blocks: tuple[int, int]) -> None:
        weight, scale = codes(100, 100), scales(-(-100 // blocks[0]), -(-100 // blocks[1]))
        tensors = {"w.weight": weight, "w.weight_scale": scale}
        found = folder(tmp_path, tensors, {"quantization_config": config})
        same(content(found.entries["w.weight"]), by_blocks(weight, scale, *blocks).bfloat16())

    def test_stacked_experts(self, tmp_path: Path) -> None:
        weight, scale = codes(3, 200, 130), scales(3, 2, 2)
        found = folder(tmp_path, {"e.gate_up_proj": weight, "e.gate_up_proj_scale_inv": scale})
        same(content(found.entries["e.gate_up_proj"], 999), by_blocks(weight, scale, 1, 128, 128).bfloat16())

    def test_a_scale_may_lie_in_another_shard(self, tmp_path: Path) -> None:
        tensors = {"w.weight": codes(128, 128), "w.weight_scale_inv": scales(1, 1)}
        entry = folder(tmp_path, tensors, shards=2).entries["w.weight"]
        assert len(entry.files) == 2
        same(content(entry), by_blocks(*tensors.values(), 128, 128).bfloat16())


@pytest.mark.parametrize("stored", [E4M3, E5M2])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "scale", "blocks"),
    [
        ((6, 8), (), (6, 8)),
        ((6, 8), (1,), (6, 8)),
        ((6, 8), (1, 1), (6, 8)),
        ((6, 8), (6, 1), (1, 8)),
        ((6, 8), (6,), (1, 8)),
        ((6, 8), (1, 8), (6, 1)),
        ((2, 6, 8), (2, 1, 1), (1, 6, 8)),
        ((2, 6, 8), (2, 1, 8), (1, 6, 1)),
        ((2, 6, 8), (2, 6, 1), (1, 1, 8)),
        ((2, 6, 8), (2,), (1, 6, 8)),
        ((5,), (1,), (5,)),
        ((), (1,), ()),
    ],
    ids=str,
)
def test_scales_for_tensors_rows_columns_and_experts(
    tmp_path: Path, shape: Any, scale: Any, blocks: Any, kind: torch.dtype, stored: torch.dtype
) -> None:
    weight, given = codes(*shape, dtype=stored), scales(*scale).to(kind)
    save_tensors(tmp_path / "x.safetensors", {"x.weight": weight, "x.weight_scale": given})
    entry = open_source(str(tmp_path / "x.safetensors")).entries["x.weight"]
    assert entry.encoding.endswith(":" + "x".join(map(str, blocks)))
    grid = given.reshape(*given.shape, *(1 for _ in range(len(shape) - given.dim()))) if given.numel() > 1 else given
    grid = grid.reshape((1,) * len(shape)) if given.numel() == 1 else grid
    same(content(entry), by_blocks(weight, grid, *blocks).bfloat16())


def test_scales_that_are_not_finite_give_values_that_are_not(tmp_path: Path) -> None:
    odd = torch.tensor([math.inf, -math.inf, math.nan, 1e38]).reshape(4, 1)
    tensors = {"w.weight": codes(4, 256), "w.weight_scale": odd}
    same(content(folder(tmp_path, tensors).entries["w.weight"]), by_blocks(*tensors.values(), 1, 256).bfloat16())


def test_tensors_without_elements_are_read(tmp_path: Path) -> None:
    found = folder(tmp_path, {"w.weight": codes(0, 4), "w.weight_scale": scales(1)})
    assert content(found.entries["w.weight"]).shape == (0, 4)


def test_the_config_and_the_notes_say_what_is_read(tmp_path: Path) -> None:
    tensors = {f"{n}.weight": codes(2, 2, seed=ord(n)) for n in "ab"} | {f"{n}.weight_scale": scales(1) for n in "ab"}
    more = {"a.input_scale": torch.ones(1), "attn.k_scale": torch.ones(()), "c.k_scale": torch.ones(4)}
    config = {"model_type": "x", "inner": {"y": 1, "quantization_config": {"quant_method": "compressed-tensors"}}}
    found = folder(tmp_path, tensors | more, config)
    assert set(found.entries) == {"a.weight", "b.weight", "c.k_scale"}
    assert found.quantized == {"F8_E4M3 with scales": 2}
    assert found.notes == (
        "not used, since they are for arithmetic in FP8: 'a.input_scale', 'attn.k_scale'",
        "quantized: of its tensors, 2 as F8_E4M3 with scales, are read as bfloat16",
    )
    assert found.config == {"model_type": "x", "inner": {"y": 1}}
    [companion] = [each for each in found.companions if each.name == "config.json"]
    assert json.loads(read_companion(companion)) == found.config


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, DType.F16),
        ({"dtype": "float32"}, DType.F32),
        ({"text_config": {"dtype": "float16"}}, DType.F16),
        ({"torch_dtype": "float8_e4m3fn"}, DType.BF16),
        ({"torch_dtype": 7}, DType.BF16),
        ({}, DType.BF16),
    ],
)
def test_the_dtype_is_the_configs_if_it_is_plain(tmp_path: Path, config: Any, dtype: DType) -> None:
    tensors = {"w.weight": codes(4, 4), "w.weight_scale": scales(4, 1)}
    entry = folder(tmp_path, tensors, config).entries["w.weight"]
    assert entry.spec == TensorSpec(dtype, (4, 4))
    same(content(entry), by_blocks(*tensors.values(), 1, 4).to(getattr(torch, dtype.torch_name)))


def test_fp8_without_scales_is_plain_fp8(tmp_path: Path) -> None:
    found = folder(tmp_path, {"w.weight": codes(4, 4)}, {"model_type": "x"})
    assert (found.entries["w.weight"].spec.dtype, found.notes) == (DType.F8_E4M3, ())


def test_a_scale_of_a_plain_weight_is_a_tensor_like_any_other(tmp_path: Path) -> None:
    found = folder(tmp_path, {"w.weight": torch.ones(2), "w.weight_scale": torch.ones(1)}, {"model_type": "x"})
    assert set(found.entries) == {"w.weight", "w.weight_scale"}


def test_quantisation_that_we_do_not_decode_is_noted_and_left_alone(tmp_path: Path) -> None:
    config = {"model_type": "x", "quantization_config": {"quant_method": "awq", "bits": 4}}
    found = folder(tmp_path, {"w.qweight": torch.ones(2, 2, dtype=torch.int32)}, config)
    assert found.notes == ("its config says awq: read as stored",)
    assert found.config == config
    assert not any(companion.derived for companion in found.companions)


def test_pickled_fp8_is_read_too(tmp_path: Path) -> None:
    tensors = {"w.weight": codes(4, 6), "w.weight_scale": scales(4, 1)}
    torch.save(tensors, tmp_path / "x.pt")
    entry = open_source(str(tmp_path / "x.pt")).entries["w.weight"]
    same(content(entry), by_blocks(*tensors.values(), 1, 6).bfloat16())
    torch.save({"w.weight": codes(4, 6).t(), "w.weight_scale": scales(6, 1)}, tmp_path / "x.pt")
    with pytest.raises(SourceError, match="do not fit each other"):
        open_source(str(tmp_path / "x.pt"))


def blocks_of(*shape: int) -> torch.Tensor:
    return codes(*shape).view(torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"w.weight": codes(4, 4), "w.weight_scale": scales(3, 1)}, r"\(F8_E4M3\[4, 4\]\) and its scales"),
        ({"w.weight": codes(4, 4), "w.weight_scale": scales(4, 1, 1)}, "do not fit"),
        ({"w.weight": codes(300, 4), "w.weight_scale": scales(2, 1)}, "do not fit"),
        ({"w.weight": codes(4, 4), "w.weight_scale": scales(0)}, "do not fit"),
        ({"w.weight": codes(4, 4), "w.weight_scale": torch.ones(1, dtype=torch.int32)}, "do not fit"),
        ({"a.weight": codes(4), "a.weight_scale": scales(1), "b.weight": codes(4)}, "without scales .*: 'b.weight'"),
        ({"a_blocks": blocks_of(2, 3, 4, 16), "a_scales": blocks_of(2, 3, 5)}, "do not fit"),
        ({"a_blocks": blocks_of(2, 3, 4, 16), "a_scales": scales(2, 3, 4)}, "do not fit"),
        ({"a_blocks": blocks_of(2, 3, 4, 16), "a_scales": blocks_of(2, 3, 4), "a": scales(1)}, "'a' is there both"),
        (
            {"a_blocks": blocks_of(2, 3, 4, 16), "a_scales": blocks_of(2, 3, 4), "b_blocks": blocks_of(2, 3, 4, 16)},
            "without scales .*: 'b_blocks'",
        ),
    ],
    ids=range(10),
)
def test_scales_that_do_not_fit_are_an_error(tmp_path: Path, tensors: Mapping[str, torch.Tensor], words: str) -> None:
    with pytest.raises(SourceError, match=words) as caught:
        folder(tmp_path, tensors)
    assert caught.value.code == "KB225"
    assert caught.value.hint


MXFP4 = {"torch_dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}


class TestMxfp4:
    """gpt-oss's form."""

    def tensors(self, experts: int = 3, outer: int = 10, groups: int = 3) -> dict[str, torch.Tensor]:
        packed = codes(experts, outer, groups, 16).view(torch.uint8)
        exponents = codes(experts, outer, groups, seed=5).view(torch.uint8) % 255
        return {"m.experts.down_proj_blocks": packed, "m.experts.down_proj_scales": exponents}

    def test_it_is_what_transformers_makes_of_it(self, tmp_path: Path) -> None:
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        tensors = self.tensors()
        found = folder(tmp_path, tensors, MXFP4)
        entry = found.entries["m.experts.down_proj"]
        expected = convert_moe_packed_tensors(*tensors.values(), dtype=torch.bfloat16)
        for step in (1 << 30, 1000, 7):
            same(content(entry, step), expected)
        assert found.quantized == {"MXFP4": 1}
        assert found.config == {"torch_dtype": "bfloat16"}

    def test_every_code_under_every_scale(self, tmp_path: Path) -> None:
        packed = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 256, 1, 1)
        exponents = torch.arange(256, dtype=torch.uint8).reshape(1, 256, 1).repeat(1, 1, 16)
        config = {**MXFP4, "torch_dtype": "float32"}
        found = folder(tmp_path, {"x_blocks": packed, "x_scales": exponents}, config).entries["x"]
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
        pairs = torch.stack([values[torch.arange(256) % 16], values[torch.arange(256) // 16]], -1).flatten()
        powers = 2.0 ** (torch.arange(256, dtype=torch.float64) - 127)
        powers[255] = math.nan
        same(content(found), (pairs[:, None] * powers).float()[None])

    def test_each_byte_is_read_once(self, tmp_path: Path) -> None:
        entry = folder(tmp_path, self.tensors(), MXFP4).entries["m.experts.down_proj"]
        with Files() as files:
            reader = files.reader(entry)
            for start in range(0, entry.spec.nbytes, 100):
                reader.read_into(start, memoryview(bytearray(min(100, entry.spec.nbytes - start))))
            assert files.bytes_read == entry.nbytes + entry.parts[0].nbytes

    def test_four_sides_of_other_bytes_are_left_alone(self, tmp_path: Path) -> None:
        tensors = {"a_blocks": blocks_of(2, 3, 4, 16), "b_blocks": blocks_of(2, 3, 4, 8)}
        assert set(folder(tmp_path, tensors, {}).entries) == set(tensors)


def test_opening_starts_neither_torch_nor_numpy(tmp_path: Path) -> None:
    folder(tmp_path, {"w.weight": codes(4, 4), "w.weight_scale": scales(1)})
    code = "import sys; from kittybuild.checkpoint.opening import open_source;"
    code += "assert open_source(sys.argv[1]).quantized; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_a_range_past_the_end_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    entry = folder(tmp_path, {"w.weight": codes(4, 4), "w.weight_scale": scales(1)}).entries["w.weight"]
    with Files() as files, pytest.raises(ValueError, match="bytes 30 to 34 of 32"):
        files.reader(entry).read_into(30, memoryview(bytearray(4)))
