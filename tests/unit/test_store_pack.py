"""The layout and header of a pack: any reader of safetensors reads it, and equal tensors give equal bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.model.manifest import pack_digest
from kittybuild.store.pack import PackLayout, read_pack_header
from kittybuild.store.store import Store
from kittybuild.tensors import DType, TensorRef, TensorSpec
from tests.faults import THREE, Sample, UnsyncedDisk, put_pack, sample

BLOCK = 4096


def layout_of(*samples: Sample) -> PackLayout:
    return PackLayout.of((s.name, s.spec) for s in samples)


def order_of(layout: PackLayout) -> list[str]:
    return [name for name, _ in layout.tensors]


def torch_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else b""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    with Store.open(str(tmp_path / "store"), disk=UnsyncedDisk()) as store:
        yield store


def test_whole_blocks_come_first_then_large_elements() -> None:
    layout = layout_of(
        sample("bytes", DType.U8, (3,)),
        sample("odd", DType.BF16, (5, 7)),
        sample("block", DType.BF16, (2048,)),
        sample("nothing", DType.F64, (0, 4)),
        sample("scalar", DType.F32, ()),
        sample("blocks", DType.I8, (3, BLOCK)),
        sample("wide", DType.I64, (3,)),
        sample("half", DType.F16, (1,)),
    )
    assert order_of(layout) == ["block", "blocks", "nothing", "wide", "scalar", "odd", "half", "bytes"]
    assert layout.header_size % BLOCK == 0
    assert layout.offset("block") == layout.header_size == layout.offsets[0]
    assert layout.offset("blocks") == layout.header_size + BLOCK
    assert layout.offset("nothing") == layout.offset("wide")
    assert layout.size == layout.offset("bytes") + 3


def test_the_layout_of_a_layout_is_itself() -> None:
    layout = layout_of(*THREE)
    assert PackLayout.of(layout.tensors) == layout


def test_the_header_does_not_grow_with_the_digests() -> None:
    layout = layout_of(*THREE)
    header = layout.header({s.name: s.ref for s in THREE})
    other = layout.header({s.name: TensorRef(Digest("f" * 64), s.spec) for s in THREE})
    assert len(header) == len(other) == layout.header_size
    assert header != other


def test_the_header_of_a_pack_is_fixed_for_ever() -> None:
    """Golden: another byte here means that every pack in every store and cache gets another name or content."""
    layout = layout_of(*THREE)
    refs = {s.name: s.ref for s in THREE}
    header = layout.header(refs)
    (length,) = struct.unpack("<Q", header[:8])
    assert length == 4088
    assert header[8:].rstrip(b" ").decode() == (
        '{"__metadata__":{"format":"pt","kittybuild":"{\\"digests\\":\\"'
        + ",".join(refs[name].digest.hex for name in ("whole", "odd", "scalar"))
        + '\\",\\"pack\\":1}"},'
        '"whole":{"dtype":"BF16","shape":[2,2048],"data_offsets":[0,8192]},'
        '"odd":{"dtype":"F32","shape":[5],"data_offsets":[8192,8212]},'
        '"scalar":{"dtype":"F16","shape":[],"data_offsets":[8212,8214]}}'
    )
    assert layout.digest(refs).hex == "4d8c99a234c3ac3a6b96d2cf669feda54abf296c71f1403d06957aa55ebcb7c7"
    assert layout.digest(refs) == pack_digest(tuple((name, refs[name]) for name in ("whole", "odd", "scalar")))


def test_every_dtype_and_odd_shape_is_read_back_by_safetensors(store: Store) -> None:
    samples = [sample(f"t.{dtype.value}", dtype, (3, 5)) for dtype in DType if dtype is not DType.BOOL]
    flags = TensorSpec(DType.BOOL, (3,))
    samples.append(Sample("flags", flags, b"\1\0\1"))
    samples += [sample("empty", DType.F32, (4, 0)), sample("scalar", DType.F64, ())]
    pack = put_pack(store, samples)
    tensors = load_file(pack.path)
    assert set(tensors) == {s.name for s in samples}
    for s in samples:
        assert tuple(tensors[s.name].shape) == s.spec.shape
        assert str(tensors[s.name].dtype) == f"torch.{s.spec.dtype.torch_name}"
        assert torch_bytes(tensors[s.name]) == s.data
    with safe_open(pack.path, "pt") as file:
        assert set(file.metadata()) == {"format", "kittybuild"}
        assert file.metadata()["format"] == "pt"
        ours = json.loads(file.metadata()["kittybuild"])
        layout, refs = read_pack_header(pack.path)
        assert ours == {"pack": 1, "digests": ",".join(refs[name].digest.hex for name in order_of(layout))}


def test_a_pack_of_nothing_is_a_file_too(store: Store) -> None:
    pack = put_pack(store, [])
    assert load_file(pack.path) == {}
    assert read_pack_header(pack.path) == (PackLayout.of(()), {})


def test_any_name_of_a_tensor_can_be_kept(store: Store) -> None:
    names = ("", "a b", 'q"uote', "back\\slash", "línea\n", "\N{CAT FACE}", "a\0b", "/../x")
    samples = [sample(name) for name in names]
    pack = put_pack(store, samples)
    assert {name: torch_bytes(t) for name, t in load_file(pack.path).items()} == {s.name: s.data for s in samples}
    assert read_pack_header(pack.path)[1] == {s.name: s.ref for s in samples}


def test_the_order_given_counts_among_equals(store: Store) -> None:
    nothing = [sample(name, DType.F32, (0,)) for name in ("b", "c", "a")]
    one, two = put_pack(store, nothing), put_pack(store, nothing[::-1])
    assert one.digest != two.digest
    assert order_of(read_pack_header(one.path)[0]) == ["b", "c", "a"]
    assert order_of(read_pack_header(two.path)[0]) == ["a", "c", "b"]


def test_equal_tensors_give_an_equal_file_whatever_made_them(store: Store, tmp_path: Path) -> None:
    pack = put_pack(store, THREE)
    with Store.open(str(tmp_path / "other"), disk=UnsyncedDisk()) as other:
        writer = other.write_pack((s.name, s.spec) for s in THREE)
        for s in reversed(THREE):
            for n in range(0, len(s.data), 512):
                writer.write(s.name, n, s.data[n : n + 512])
            writer.done(s.name, s.ref, None, None)
        again = writer.finish()
    assert again.digest == pack.digest
    assert Path(again.path).read_bytes() == Path(pack.path).read_bytes()
    assert again.size == pack.size == Path(pack.path).stat().st_size


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([sample("a"), sample("b"), sample("a")], "more than one tensor is named 'a'"),
        ([sample("__metadata__")], "a tensor may not be named __metadata__"),
        ([Sample("\ud800", TensorSpec(DType.U8, (0,)), b"")], "surrogates not allowed"),
    ],
)
def test_what_cannot_be_a_pack_is_refused(tensors: list[Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackLayout.of((s.name, s.spec) for s in tensors)


def test_a_header_takes_only_tensors_that_fit_the_layout() -> None:
    layout = layout_of(*THREE)
    refs = {s.name: s.ref for s in THREE} | {"odd": TensorRef(THREE[0].ref.digest, TensorSpec(DType.I32, (5,)))}
    with pytest.raises(ValueError, match=r"odd: I32\[5\] does not fit the layout's F32\[5\]"):
        layout.header(refs)


FORMS = {
    "of another writer": '{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "without metadata": '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
    "not JSON": "{",
    "not an object": "[]",
    "nested deeply": "[" * 4000,
    "of another dtype": '{"__metadata__":{"format":"pt","kittybuild":"{}"},"a":{"dtype":"F4","shape":[1]}}',
}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_a_header_that_we_would_not_write_is_damaged(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    body = text.encode().ljust(BLOCK - 8)
    path.write_bytes(struct.pack("<Q", len(body)) + body + b"\0")
    with pytest.raises(StoreError, match="KB706: damaged: not the header of a pack"):
        read_pack_header(str(path))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"shape":[5]', '"shape":[5.0]'),
        ('"shape":[5]', '"shape":[true,5]'),
        ('"pack\\":1', '"pack\\":2'),
        ('"data_offsets":[8192,8212]', '"data_offsets":[8196,8216]'),
        ('"format":"pt"', '"format":"np"'),
        ('{"__metadata__"', '{ "__metadata__"'),
    ],
)
def test_a_header_is_compared_byte_for_byte(old: str, new: str, store: Store, tmp_path: Path) -> None:
    data = Path(put_pack(store, THREE).path).read_bytes()
    body = data[8:BLOCK].rstrip(b" ").decode()
    assert old in body
    path = tmp_path / "file.safetensors"
    path.write_bytes(data[:8] + body.replace(old, new).encode().ljust(BLOCK - 8) + data[BLOCK:])
    with pytest.raises(StoreError, match="KB706: damaged"):
        read_pack_header(str(path))


def test_a_file_that_is_absent_is_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_pack_header(str(tmp_path / "absent"))
