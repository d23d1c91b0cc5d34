"""Any list of tensors makes a pack that safetensors reads, aligned, and that our reader gives back."""

from __future__ import annotations

import os

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from kittybuild.store.pack import BLOCK, PackLayout, read_pack_header
from kittybuild.store.store import Store
from kittybuild.tensors import DType
from tests.faults import Sample, UnsyncedDisk, put_pack, quick_folder, sample

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 64, 512]), max_size=2)
SAMPLES = st.lists(
    st.builds(
        lambda name, dtype, shape: sample(name, dtype, tuple(shape)),
        NAMES,
        st.sampled_from([dtype for dtype in DType if dtype is not DType.BOOL]),
        SHAPES,
    ),
    unique_by=lambda s: s.name,
    max_size=6,
)


@given(SAMPLES)
def test_a_layout_is_gapless_aligned_and_stable(samples: list[Sample]) -> None:
    layout = PackLayout.of((s.name, s.spec) for s in samples)
    assert sorted(layout.tensors) == sorted((s.name, s.spec) for s in samples) if samples else layout.tensors == ()
    assert PackLayout.of(layout.tensors) == layout
    end = layout.header_size
    assert end % BLOCK == 0
    odd = False
    for (name, spec), offset in zip(layout.tensors, layout.offsets, strict=True):
        assert offset == end == layout.offset(name)
        assert offset % spec.dtype.size == 0
        whole = spec.nbytes > 0 and spec.nbytes % BLOCK == 0
        assert not (whole and odd), "whole blocks come first"
        odd = odd or not whole
        end += spec.nbytes
    assert layout.size == end
    assert len(layout.header({s.name: s.ref for s in samples})) == layout.header_size


@settings(max_examples=40)
@given(SAMPLES)
def test_safetensors_and_we_read_the_same(samples: list[Sample]) -> None:
    with quick_folder() as root:
        with Store.open(str(root), disk=UnsyncedDisk()) as store:
            pack = put_pack(store, samples)
        layout, refs = read_pack_header(pack.path)
        assert layout == PackLayout.of((s.name, s.spec) for s in samples)
        assert refs == {s.name: s.ref for s in samples}
        with safe_open(pack.path, "numpy") as file, open(pack.path, "rb") as raw:
            assert set(file.keys()) == {s.name for s in samples}
            for s in samples:
                view = file.get_slice(s.name)
                assert (view.get_dtype(), tuple(view.get_shape())) == (s.spec.dtype.value, s.spec.shape)
                assert os.pread(raw.fileno(), s.spec.nbytes, layout.offset(s.name)) == s.data
