"""Torch files of both layouts, read as torch.load reads them, without torch."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.checkpoint import state_dict
from kittybuild.checkpoint.pickled import read_pickled
from kittybuild.checkpoint.reading import Files
from kittybuild.checkpoint.source import RAW
from kittybuild.tensors import DType
from tests.torchfiles import LAYOUTS, content, raw, read, refused, same, save


@pytest.mark.parametrize("layout", LAYOUTS)
class TestSound:
    @pytest.mark.parametrize("dtype", list(DType), ids=lambda dtype: dtype.value)
    def test_every_dtype(self, tmp_path: Path, layout: str, dtype: DType) -> None:
        tensor = torch.arange(24, dtype=torch.uint8).repeat(8).view(getattr(torch, dtype.torch_name))
        if dtype is DType.BOOL:
            tensor = torch.arange(24) % 3 == 0
        tensors = {"x": tensor, "part": tensor[5:9], "none": tensor[:0]}
        same(read(save(tmp_path / "x.pt", tensors, layout)), tensors)

    def test_a_models_state_dict(self, tmp_path: Path, layout: str) -> None:
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5))
        path = save(tmp_path / "x.bin", model.state_dict(), layout)
        entries, notes = read_pickled(str(path))
        same(entries, model.state_dict())
        assert notes == ()
        assert {entry.encoding for entry in entries.values()} == {RAW}

    def test_parameters_and_tensors_with_attributes(self, tmp_path: Path, layout: str) -> None:
        tagged = torch.nn.Parameter(torch.ones(2))
        tagged.tag = "tag"  # type: ignore[attr-defined]
        tensors = {"p": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)), "t": tagged}
        same(read(save(tmp_path / "x.bin", tensors, layout)), tensors)

    def test_tied_tensors_are_one_range_of_the_file(self, tmp_path: Path, layout: str) -> None:
        shared = torch.arange(6.0).reshape(2, 3)
        entries = read(save(tmp_path / "x.bin", {"a": shared, "b": shared, "c": shared.view(-1)[2:]}, layout))
        assert entries["a"].offset == entries["b"].offset == entries["c"].offset - 8
        same(entries, {"a": shared, "b": shared, "c": shared.view(-1)[2:]})

    def test_views_in_another_order(self, tmp_path: Path, layout: str) -> None:
        base = torch.arange(2 * 3 * 4 * 5, dtype=torch.int16).reshape(2, 3, 4, 5)
        views = {
            "transposed": base.flatten(1).t(),
            "last": base.permute(0, 2, 3, 1),
            "channels": base.to(memory_format=torch.channels_last),
            "columns": base.reshape(24, 5)[3:20, 1:4],
            "every other": base.flatten()[3::7],
            "alone": base[:, 1:2, :, 2:3].squeeze(),
            "one": base[1, 2, 3, 4],
            "diagonal": base[0, 0].diagonal(),
        }
        entries = read(save(tmp_path / "x.pt", views, layout))
        same(entries, views)
        assert entries["transposed"].encoding == "strides:1x60"
        assert entries["one"].encoding == RAW

    @pytest.mark.parametrize("protocol", [2, 3, 4, 5])
    def test_every_protocol_of_pickle(self, tmp_path: Path, layout: str, protocol: int) -> None:
        tensors = {"x": torch.arange(6.0).reshape(2, 3), "größe": torch.ones(300, 2)}
        others = {"seen": {1, "a"}, "raw": b"x", "frozen": frozenset("ab")} if protocol > 3 else {"seen": [1], "raw": 2}
        value = {"state_dict": collections.OrderedDict(tensors), **others, "at": (1, 2.5, None, True, 1 << 70, -300)}
        entries, notes = read_pickled(str(save(tmp_path / "x.pt", value, layout, pickle_protocol=protocol)))
        same(entries, tensors)
        last = "'frozen' and 1 more" if protocol > 3 else "'at'"
        assert notes == (
            f"not read, since it is no tensor: 'seen', 'raw', {last}",
            "its tensors are those of its entry 'state_dict'",
        )


class TestNames:
    """Nested dicts: which of them is the model, and that nothing else is lost without a word."""

    X, Y = torch.ones(2), torch.zeros(3)

    @pytest.mark.parametrize(
        ("value", "names", "notes"),
        [
            ({"w": X, "step": 3}, ["w"], ["not read, since it is no tensor: 'step'"]),
            ({"model": {"w": X}}, ["w"], ["its tensors are those of its entry 'model'"]),
            (
                {"epoch": 1, "model_state_dict": {"w": X}, "optimizer_state_dict": {"state": {0: {"m": Y}}, "lr": 0.1}},
                ["w"],
                [
                    "not read, since training kept it beside the model: 'optimizer_state_dict'",
                    "not read, since it is no tensor: 'epoch'",
                    "its tensors are those of its entry 'model_state_dict'",
                ],
            ),
            (
                {"a": {"state_dict": {"w": X, "n": [1, 2]}}},
                ["w"],
                [
                    "its tensors are those of its entry 'a'",
                    "its tensors are those of its entry 'state_dict'",
                    "not read, since it is no tensor: 'n'",
                ],
            ),
            (
                {"model": {"w": X}, "ema": {"w": Y}, "scheduler": {"t": X}},
                ["model.w", "ema.w"],
                [
                    "not read, since training kept it beside the model: 'scheduler'",
                    "its dicts are one, with names joined by dots: 'model', 'ema'",
                ],
            ),
            ({"w": X, "inner": {"v": Y, "k": 1}}, ["w", "inner.v"], ["not read, since it is no tensor: 'inner.k'"]),
            ({"layers": [X, (Y, {3: X})]}, ["0", "1.0", "1.1.3"], ["its tensors are those of its entry 'layers'"]),
            ({"optimizer": {"m": X}}, ["m"], ["its tensors are those of its entry 'optimizer'"]),
            ({"scaler": X, "loop.weight": Y}, ["scaler", "loop.weight"], []),
        ],
        ids=range(9),
    )
    def test_the_state_dict_is_found(self, tmp_path: Path, value: Any, names: list[str], notes: list[str]) -> None:
        entries, found = read_pickled(str(save(tmp_path / "x.pt", value)))
        assert (list(entries), list(found)) == (names, notes)

    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (torch.ones(2), "no dict of tensors"),
            ([torch.ones(2)], "no dict of tensors"),
            ({"a.b": X, "a": {"b": Y}}, "'a.b' is the name of two"),
            ({1: X, "1": Y}, "another's name"),
            ({1.5: X}, "no name"),
            ({("a", 1): X}, "no name"),
            ({"x" * 1025: X}, "at most 1024 bytes"),
            ({"a" * 600: {"b" * 600: X}, "c": Y}, "too long a name"),
            ({"\ud800": X}, "no text"),
            ({"a\0b": X}, "no text"),
        ],
        ids=range(10),
    )
    def test_what_cannot_be_named_is_an_error(self, tmp_path: Path, value: Any, words: str) -> None:
        assert words in refused(save(tmp_path / "x.pt", value), "KB224").message

    def test_a_dict_in_itself_is_an_error(self, tmp_path: Path) -> None:
        value: dict[str, Any] = {"x": self.X}
        value["again"] = value
        assert "deeper than 16" in refused(save(tmp_path / "x.pt", value), "KB224").message

    def test_dicts_that_multiply_are_an_error_at_once(self, tmp_path: Path) -> None:
        value: dict[str, Any] = {"x": self.X}
        for _ in range(10):
            value = {str(number): value for number in range(100)}
        assert f"more than {state_dict.MOST_VALUES} values" in refused(save(tmp_path / "x.pt", value), "KB224").message

    def test_a_file_without_tensors_is_empty(self, tmp_path: Path) -> None:
        entries, notes = read_pickled(str(save(tmp_path / "x.pt", {"lr": 0.1})))
        assert (entries, notes) == ({}, ("not read, since it is no tensor: 'lr'",))


SIDES = st.lists(st.integers(0, 6), min_size=0, max_size=4)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    """A tensor cut, permuted and narrowed at will."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.float8_e4m3fn]))
    sides = draw(SIDES)
    whole = torch.arange(torch.Size(sides).numel() * dtype.itemsize) % 251
    tensor = whole.to(torch.uint8).view(dtype).reshape(sides) if 0 not in sides else torch.zeros(sides, dtype=dtype)
    for axis, side in enumerate(sides):
        start = draw(st.integers(0, side))
        cut = slice(start, draw(st.integers(start, side)), draw(st.integers(1, 3)))
        tensor = tensor[(slice(None),) * axis + (cut,)]
    return tensor.permute(draw(st.permutations(range(len(sides)))))


@given(
    tensors=st.dictionaries(st.text("abc.", min_size=1), views(), min_size=1, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    data=st.data(),
)
def test_whatever_is_saved_is_read_as_torch_loads_it(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], layout: str, data: st.DataObject
) -> None:
    path = save(tmp_path_factory.getbasetemp() / "saved.pt", tensors, layout)
    entries = read(path)
    same(entries, tensors)
    for name, entry in entries.items():
        cuts = tuple(data.draw(st.lists(st.integers(0, entry.spec.nbytes), max_size=4)))
        assert content(entry, cuts) == raw(tensors[name])
    if layout == "zip":  # torch itself cannot load FP8 from the legacy layout that it writes
        same(entries, torch.load(path, weights_only=True))


def test_a_large_transposed_matrix_is_read_in_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kittybuild.checkpoint import strided

    monkeypatch.setattr(strided, "_PANEL", 1 << 14)
    monkeypatch.setattr(strided, "_PIECE", 1 << 9)
    tensor = torch.arange(300 * 200, dtype=torch.int32).reshape(200, 300).t()
    entry = read(save(tmp_path / "x.pt", {"x": tensor}))["x"]
    assert content(entry, tuple(range(0, entry.spec.nbytes, 999))) == raw(tensor)
    with Files() as files:
        reader = files.reader(entry)
        for start in range(0, entry.spec.nbytes, 1000):
            reader.read_into(start, memoryview(bytearray(min(1000, entry.spec.nbytes - start))))
        assert files.bytes_read == entry.nbytes, "each element is read once"


def test_opening_starts_neither_torch_nor_numpy(tmp_path: Path) -> None:
    path = save(tmp_path / "pytorch_model.bin", {"x": torch.ones(2)})
    code = "import sys; from kittybuild.checkpoint.opening import open_source; open_source(sys.argv[1]);"
    code += "print([name for name in ('torch', 'numpy', 'gguf', 'pickle') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "['pickle']"  # pickletools imports it; we never call it
