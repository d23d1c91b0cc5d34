"""Headers of safetensors files from strangers: sound ones are read as the library reads them, all others refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kittybuild.checkpoint import safetensors_file
from kittybuild.checkpoint.reading import Files
from kittybuild.checkpoint.safetensors_file import read_safetensors
from kittybuild.errors import SourceError
from kittybuild.tensors import DType, TensorSpec

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def file(tmp_path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with that header (JSON, text or bytes), that data, and the header's length or another one."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path = tmp_path / "x.safetensors"
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def refused(path: Path) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read_safetensors(str(path))
    assert caught.value.at == str(path)
    assert caught.value.hint
    return caught.value


class TestSound:
    TENSORS = (
        ("weight", torch.arange(6, dtype=torch.float32).reshape(2, 3)),
        ("half", torch.ones(5, dtype=torch.bfloat16)),
        ("scalar", torch.tensor(3.5, dtype=torch.float64)),
        ("nothing", torch.zeros(0, 4)),
        ("ids", torch.tensor([1, -2], dtype=torch.int64)),
        ("mask", torch.tensor([True, False])),
        ("é/Ünïcode name", torch.ones(1, dtype=torch.float8_e4m3fn)),
    )

    def test_what_the_library_writes_is_read_with_its_bytes(self, tmp_path: Path) -> None:
        path = str(tmp_path / "x.safetensors")
        save_file(dict(self.TENSORS), path, metadata={"format": "pt"})
        entries = read_safetensors(path)
        assert set(entries) == {name for name, _ in self.TENSORS}
        with safe_open(path, "pt") as there, Files() as files:
            for name, entry in entries.items():
                tensor = there.get_tensor(name)
                assert entry.spec.shape == tuple(tensor.shape)
                assert entry.spec.dtype.torch_name == str(tensor.dtype).removeprefix("torch.")
                buffer = bytearray(entry.nbytes)
                files.reader(entry).read_into(0, memoryview(buffer))
                assert buffer == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()

    @pytest.mark.parametrize("dtype", list(DType))
    def test_every_dtype_that_we_know(self, tmp_path: Path, dtype: DType) -> None:
        header = {"x": {"dtype": dtype.value, "shape": [3], "data_offsets": [0, 3 * dtype.size]}}
        (entry,) = read_safetensors(str(file(tmp_path, header, bytes(3 * dtype.size)))).values()
        assert entry.spec == TensorSpec(dtype, (3,))

    def test_the_order_is_the_headers(self, tmp_path: Path) -> None:
        header = {"b": {**F32, "data_offsets": [8, 16]}, "a": F32}
        assert list(read_safetensors(str(file(tmp_path, header, bytes(16))))) == ["b", "a"]

    def test_the_offset_counts_from_the_start_of_the_file(self, tmp_path: Path) -> None:
        path = file(tmp_path, {"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, bytes(8) + b"12345678")
        entry = read_safetensors(str(path))["b"]
        assert path.read_bytes()[entry.offset : entry.offset + entry.nbytes] == b"12345678"

    def test_metadata_padding_and_no_tensors_at_all(self, tmp_path: Path) -> None:
        assert read_safetensors(str(file(tmp_path, '{"__metadata__": {"format": "pt"}}     '))) == {}

    def test_empty_tensors_may_lie_anywhere_in_a_row(self, tmp_path: Path) -> None:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}
        assert len(read_safetensors(str(file(tmp_path, {"z": empty, "a": F32, "b": empty}, bytes(8))))) == 3


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    whole = file(tmp_path, {"a": F32, "b": {**F32, "data_offsets": [8, 16]}}, bytes(16)).read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        assert refused(cut).code == "KB202", length
    cut.write_bytes(whole + b"\0")
    assert f"describes {len(whole)} bytes, the file has {len(whole) + 1}" in refused(cut).message


@pytest.mark.parametrize("length", [0, 1, 57, 59, 1 << 20, (1 << 64) - 1])
def test_a_header_length_that_lies_is_refused(tmp_path: Path, length: int) -> None:
    assert refused(file(tmp_path, {"a": F32}, bytes(8), length=length)).code == "KB202"


def test_a_header_over_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    too_long = safetensors_file.LONGEST_HEADER + 1
    with path.open("wb") as sparse:
        sparse.write(too_long.to_bytes(8, "little"))
        sparse.truncate(2 * too_long)
    assert "more than the 100000000 allowed" in refused(path).message


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {**F32, **changes}}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("", "no JSON object"),
        ("[1]", "no JSON object"),
        (" {}", "no JSON object"),
        ("{", "not JSON"),
        ("{} {}", "not JSON: Extra data at its character 3"),
        ('{"a": }', "not JSON"),
        ("{" * 50_000, "not JSON"),
        ('{"a": ' * 50_000, "recursion"),
        ('{"x": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 8]}}', "digits"),
        (b'{"\xff": 1}', "not UTF-8"),
        ("{}".encode("utf-16-le"), "not JSON"),
        ('{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "not UTF-8"),
        (
            '{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            ' "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            "the name 'x' stands in its header twice",
        ),
        ({"x": None}, "entry of 'x'"),
        ({"x": []}, "entry of 'x'"),
        ({"x": {"dtype": "F32", "shape": [2]}}, "entry of 'x'"),
        (entry(dtype=4), "entry of 'x'"),
        (entry(shape=2), "entry of 'x'"),
        (entry(shape=[-2]), "entry of 'x'"),
        (entry(shape=[-1, -2]), "entry of 'x'"),
        (entry(shape=[2.0]), "entry of 'x'"),
        (entry(shape=[True, 2]), "entry of 'x'"),
        (entry(shape=[1 << 63]), "entry of 'x'"),
        (entry(shape=["2"]), "entry of 'x'"),
        (entry(data_offsets=[0]), "entry of 'x'"),
        (entry(data_offsets=[0, 8, 8]), "entry of 'x'"),
        (entry(data_offsets=[False, 8]), "entry of 'x'"),
        (entry(data_offsets=[0.0, 8]), "entry of 'x'"),
        (entry(data_offsets=[-8, 0]), "entry of 'x'"),
        (entry(data_offsets=[8, 0]), "instead of"),
        (entry(data_offsets=[0, 4]), "[0, 4) instead of [0, 8)"),
        (entry(data_offsets=[0, 16]), "[0, 16) instead of [0, 8)"),
        (entry(data_offsets=[4, 12]), "[4, 12) instead of [0, 8)"),
        (entry(shape=[1 << 40, 1 << 40]), "instead of"),
        ({"a": F32, "b": F32}, "'b' (F32[2]) lies at [0, 8) instead of [8, 16)"),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, "instead of [8, 16)"),
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, "instead of [8, 16)"),
    ],
)
def test_every_other_header_is_refused_with_its_defect(tmp_path: Path, header: Any, words: str) -> None:
    error = refused(file(tmp_path, header, bytes(8)))
    assert error.code == "KB202"
    assert words in error.message


def test_an_unknown_dtype_is_named_beside_those_we_know(tmp_path: Path) -> None:
    error = refused(file(tmp_path, entry(dtype="F4"), bytes(8)))
    assert error.code == "KB203"
    assert "'x' has the dtype 'F4'" in error.message
    assert "BF16" in str(error.hint)


def test_a_pointer_of_git_lfs_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    assert refused(tmp_path / "x.safetensors").hint == "run `git lfs pull`"


def test_names_in_messages_cannot_move_the_cursor(tmp_path: Path) -> None:
    error = refused(file(tmp_path, {"\x1b[2Jx\n": {**F32, "data_offsets": [1, 9]}}, bytes(9)))
    assert "\x1b" not in error.message
    assert "\n" not in error.message


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none.safetensors").code == "KB201"
    assert refused(tmp_path).code == "KB201"


def test_a_file_that_shrank_since_is_noticed_on_reading(tmp_path: Path) -> None:
    path = file(tmp_path, {"a": F32}, bytes(8))
    entry = read_safetensors(str(path))["a"]
    path.write_bytes(path.read_bytes()[:-3])
    with Files() as files, pytest.raises(SourceError, match="3 bytes too early") as caught:
        files.reader(entry).read_into(0, memoryview(bytearray(8)))
    assert caught.value.code == "KB202"
