"""Values: digests and the one encoding that is hashed, specs and refs, derivation keys, manifests, errors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from kittybuild.digest import Digest, canonical, hexed, tagged
from kittybuild.errors import KittybuildError, PlanError, Problems, RecipeError, SourceError, nearest, raise_all
from kittybuild.model.derivation import Derivation, SourceTensor, StageTensor
from kittybuild.model.manifest import Manifest, ManifestFile, ManifestShard, ManifestTensor, pack_digest
from kittybuild.model.recipe import At, ModelRef, to_json
from kittybuild.tensors import DType, TensorRef, TensorSpec

ONE, TWO = Digest.of(b"one"), Digest.of(b"two")
SPEC = TensorSpec(DType.BF16, (2, 3))


class TestDigest:
    def test_it_is_blake3(self) -> None:
        # The test vector of the BLAKE3 paper's repository for no input at all.
        assert Digest.of(b"").hex == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"

    @pytest.mark.parametrize("text", ["", "ab", "A" * 64, "g" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n"])
    def test_only_64_small_hex_digits_are_one(self, text: str) -> None:
        with pytest.raises(ValueError, match="not a digest"):
            Digest(text)

    def test_the_encoding_has_one_form(self) -> None:
        assert canonical({"b": [1, True, None], "a": "é"}) == '{"a":"é","b":[1,true,null]}'.encode()
        assert hexed({"x": (0.1, -0.0, 1)}) == {"x": ["0x1.999999999999ap-4", "-0x0.0p+0", 1]}

    def test_floats_count_by_all_their_bits(self) -> None:
        assert tagged("t", 0.1) != tagged("t", 0.1 + 1e-17 + 1e-16)
        assert tagged("t", 0.0) != tagged("t", -0.0)
        assert tagged("t", 1.0) != tagged("t", 1)
        assert tagged("t", 1) != tagged("u", 1)

    def test_what_has_no_form_is_refused(self) -> None:
        with pytest.raises(TypeError):
            tagged("t", {"x": {1, 2}})
        with pytest.raises(TypeError):
            tagged("t", b"bytes")


class TestTensors:
    def test_sizes(self) -> None:
        assert (SPEC.numel, SPEC.nbytes, str(SPEC)) == (6, 12, "BF16[2, 3]")
        assert TensorSpec(DType.F64, ()).nbytes == 8
        assert TensorSpec(DType.I32, (3, 0)).nbytes == 0
        assert [dtype.size for dtype in (DType.F8_E4M3, DType.BOOL, DType.U16, DType.F32, DType.I64)] == [1, 1, 2, 4, 8]

    def test_a_side_is_never_negative(self) -> None:
        with pytest.raises(ValueError, match="not a shape"):
            TensorSpec(DType.F32, (2, -1))

    @pytest.mark.parametrize("dtype", list(DType))
    def test_the_names_of_torch_lead_back(self, dtype: DType) -> None:
        assert DType.named(dtype.torch_name) is dtype
        assert DType.named(f"torch.{dtype.torch_name}") is dtype

    def test_other_names_are_none(self) -> None:
        assert [DType.named(name) for name in ("bf16", "BF16", "", "float")] == [None] * 4

    def test_floating_point(self) -> None:
        assert {dtype.name for dtype in DType if dtype.is_float} == {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}

    def test_a_ref_goes_to_json_and_back(self) -> None:
        ref = TensorRef(ONE, SPEC)
        assert TensorRef.from_json(json.loads(json.dumps(ref.to_json()))) == ref

    @pytest.mark.parametrize(
        "value", [None, [], ["x", "F32", [1]], [ONE.hex, "F31", [1]], [ONE.hex, "F32", [-1]], [ONE.hex, "F32", [True]]]
    )
    def test_what_is_no_ref_is_refused(self, value: Any) -> None:
        with pytest.raises(ValueError, match=r"not a|F31"):
            TensorRef.from_json(value)


class TestDerivation:
    MADE = Derivation(
        "linear",
        1,
        {"weight": [0.5, 0.25], "normalize": True},
        (SourceTensor("a", "x", SPEC), StageTensor("s", "x", SPEC)),
        SPEC,
    )
    REFS = (TensorRef(ONE, SPEC), TensorRef(TWO, SPEC))

    def test_its_key_is_over_these_bytes_unless_we_want_all_caches_to_miss(self) -> None:
        form = (
            '{"builder":"linear",'
            f'"inputs":[["{ONE}","BF16",[2,3]],["{TWO}","BF16",[2,3]]],'
            '"numerics":"kitty-1",'
            '"outputs":[["BF16",[2,3]]],'
            '"params":{"normalize":true,"weight":["0x1.0000000000000p-1","0x1.0000000000000p-2"]},'
            '"version":1}'
        )
        assert self.MADE.key(self.REFS) == Digest.of(b"kittybuild.drv.v1\0" + form.encode())

    def test_names_of_sources_stages_and_tensors_do_not_count(self) -> None:
        renamed = replace(self.MADE, inputs=(StageTensor("t", "y", SPEC), SourceTensor("b", "z", SPEC)))
        assert renamed.key(self.REFS) == self.MADE.key(self.REFS)

    @pytest.mark.parametrize(
        "change",
        [
            {"builder": "ties"},
            {"version": 2},
            {"params": {"weight": [0.5, 0.5], "normalize": True}},
            {"params": {"weight": [0.25, 0.5], "normalize": True}},
            {"params": {"weight": [0.5, 0.25]}},
            {"output": TensorSpec(DType.F32, (2, 3))},
            {"numerics": "mergekit-0.1.5"},
        ],
    )
    def test_all_that_can_change_the_bits_counts(self, change: dict[str, Any]) -> None:
        assert replace(self.MADE, **change).key(self.REFS) != self.MADE.key(self.REFS)

    def test_the_inputs_count_by_content_and_order(self) -> None:
        assert self.MADE.key(self.REFS[::-1]) != self.MADE.key(self.REFS)

    def test_contents_that_do_not_fit_are_refused(self) -> None:
        for refs in (self.REFS[:1], (self.REFS[0], TensorRef(TWO, TensorSpec(DType.F32, (2, 3))))):
            with pytest.raises(ValueError, match="do not fit"):
                self.MADE.key(refs)


class TestManifest:
    WHOLE = Manifest(
        (ManifestTensor("x", TensorRef(ONE, SPEC), TWO), ManifestTensor("y", TensorRef(TWO, SPEC), None)),
        (ManifestShard(ONE, 4096, ("x", "y")),),
        (ManifestFile("config.json", TWO, 12),),
    )

    def test_it_goes_to_bytes_and_back(self) -> None:
        assert Manifest.from_bytes(self.WHOLE.to_bytes()) == self.WHOLE
        assert self.WHOLE.digest == Digest.of(self.WHOLE.to_bytes())

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"{}",
            b"[]",
            b"null",
            b"\xff",
            b'{"kittybuild.manifest": 2, "tensors": [], "shards": [], "files": []}',
            b'{"kittybuild.manifest": 1, "tensors": [["x"]], "shards": [], "files": []}',
            b'{"kittybuild.manifest": 1, "tensors": [3], "shards": [], "files": []}',
            b'{"kittybuild.manifest": 1, "tensors": [], "shards": [["x", 1, []]], "files": []}',
            b'{"kittybuild.manifest": 1, "tensors": [], "shards": [], "files": [["x", 3, 1]]}',
            b'{"kittybuild.manifest": 1, "tensors": [], "shards": [], "files": [], "nonfinite": ["x"]}',
            b'{"kittybuild.manifest": 1, "tensors": [], "shards": [], "files": [], "nonfinite": {"x": "y"}}',
        ],
    )
    def test_anything_else_is_refused(self, data: bytes) -> None:
        with pytest.raises(ValueError):  # noqa: PT011  (of whatever kind: the store says what is damaged)
            Manifest.from_bytes(data)

    def test_a_pack_is_named_by_its_ordered_list(self) -> None:
        one, two = ("x", TensorRef(ONE, SPEC)), ("y", TensorRef(TWO, SPEC))
        names = {
            pack_digest((one, two)),
            pack_digest((two, one)),
            pack_digest((one,)),
            pack_digest((("z", one[1]), two)),
        }
        assert len(names) == 4


def test_a_recipes_values_print_without_their_places() -> None:
    assert to_json(ModelRef("a", at=At("r.yml", 3, 4))) == {
        "model": "a",
        "revision": None,
        "adapter": None,
        "adapter_revision": None,
    }


class TestErrors:
    def test_what_where_and_the_way_out(self) -> None:
        error = RecipeError("KB102", "unknown key 'x'", at="r.yml:1:2", hint="did you mean 'y'?")
        assert str(error) == "r.yml:1:2: KB102: unknown key 'x'\n  hint: did you mean 'y'?"
        assert str(SourceError("KB201", "gone")) == "KB201: gone"
        assert error.to_json() == {
            "code": "KB102",
            "message": "unknown key 'x'",
            "at": "r.yml:1:2",
            "hint": "did you mean 'y'?",
        }

    def test_one_error_is_itself_and_several_are_problems(self) -> None:
        first, second = PlanError("KB301", "a"), SourceError("KB201", "b")
        raise_all([])
        with pytest.raises(PlanError):
            raise_all([first])
        with pytest.raises(Problems) as caught:
            raise_all([first, second])
        assert str(caught.value) == "KB301: a\nKB201: b"
        assert (caught.value.code, caught.value.exit_status) == ("KB301", 3)
        assert isinstance(caught.value, KittybuildError)

    def test_the_nearest_word_or_the_first_of_them(self) -> None:
        assert nearest("linaer", ["linear", "ties"]) == "did you mean 'linear'?"
        assert nearest("x", ["ties", "linear"]) == "known: linear, ties"
        assert nearest("x", []) == "nothing is known here"
        assert nearest("?", [f"w{number:02}" for number in range(25)]).endswith("w19 and 5 more")
