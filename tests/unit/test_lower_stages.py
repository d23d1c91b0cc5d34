"""Several stages lowered together: adapters, chains, pruning, shards, and what follows from an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kittybuild.builders.registry import BUILTIN
from kittybuild.errors import UsageError
from kittybuild.model.derivation import SourceTensor, StageTensor
from kittybuild.model.plan import Plan
from kittybuild.planner.lower import shards_of
from kittybuild.planner.targets import targets
from kittybuild.planner.views import locate, source_names
from kittybuild.recipe.parse import parse_recipe
from kittybuild.tensors import DType, TensorSpec
from tests.helpers import pico_adapter, pico_llama, save_tensors
from tests.planning import errors_of, found, llama, parse, planned, step, write_header

Q0 = "model.layers.0.self_attn.q_proj.weight"
K0 = "model.layers.0.self_attn.k_proj.weight"
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B0 = A0.replace("lora_A", "lora_B")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two siblings' headers, and two adapters."""
    folder = tmp_path_factory.mktemp("zoo")
    pico_llama(folder / "base", 1)
    write_header(folder / "a", llama())
    write_header(folder / "lame", {name: spec for name, spec in llama().items() if "norm" not in name})
    pico_adapter(folder / "joy", folder / "base", 2, lora_alpha=2)
    pico_adapter(folder / "zen", folder / "base", 3, rank=8, targets=["q_proj", "k_proj"])
    return folder


def plan(zoo: Path, text: str, *asked: str) -> Plan:
    return planned(zoo, {}, text, asked)


class TestAdapters:
    TEXT = """\
    kittybuild: 1
    stages:
      glad:
        kind: apply_lora
        base: base
        adapters: [{adapter: joy, weight: 3}, {adapter: zen}]
    """

    def test_one_derivation_for_each_weight_that_an_adapter_changes(self, zoo: Path) -> None:
        found = plan(zoo, self.TEXT)
        assert set(found.stages["glad"].derivations) == {
            f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkv"
        }
        made = step(found, Q0, "glad")
        assert made.params == {"scales": [1.5, 2.0], "transposed": False}
        inputs = [(given.source, given.name) for given in made.inputs if isinstance(given, SourceTensor)]
        assert inputs == [("base", Q0), ("joy", A0), ("joy", B0), ("zen", A0), ("zen", B0)]
        assert step(found, K0, "glad").params["scales"] == [2.0]
        assert isinstance(found.stages["glad"].steps["model.norm.weight"], SourceTensor)

    def test_a_dtype_casts_what_no_adapter_changes(self, zoo: Path) -> None:
        found = plan(zoo, self.TEXT.replace("base: base", "base: base\n        out_dtype: float32"))
        assert step(found, "model.norm.weight", "glad").builder == "cast"
        assert step(found, Q0, "glad").output == TensorSpec(DType.F32, (32, 32))
        config = found.stages["glad"].config
        assert config is not None
        assert config["torch_dtype"] == "float32"

    def test_a_reference_with_an_adapter_is_a_stage_of_its_own(self, zoo: Path) -> None:
        found = plan(zoo, "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: base}, {model: base+joy}]")
        assert list(found.stages) == ["base+joy", "merge"]
        assert set(found.stages["base+joy"].steps) == set(found.stages["base+joy"].derivations)
        first, second = step(found, Q0).inputs
        assert (first, second) == (
            SourceTensor("base", Q0, first.spec),
            StageTensor("base+joy", Q0, first.spec),
        )
        norm = step(found, "model.norm.weight").inputs
        assert [type(given) for given in norm] == [SourceTensor, SourceTensor]

    def test_two_references_to_it_are_one_stage(self, zoo: Path) -> None:
        text = """\
        kittybuild: 1
        stages:
          one: {merge_method: passthrough, models: [{model: base+joy}]}
          two: {merge_method: linear, models: [{model: base+joy, parameters: {weight: 1}}]}
        """
        assert sorted(plan(zoo, text).stages) == ["base+joy", "one", "two"]

    def test_an_adapter_on_a_stage(self, zoo: Path) -> None:
        text = """\
        kittybuild: 1
        stages:
          soup: {merge_method: linear, parameters: {weight: 1}, models: [{model: base}, {model: a}]}
          glad: {merge_method: passthrough, models: [{model: soup+joy}]}
        """
        found = plan(zoo, text)
        assert list(found.stages) == ["soup", "soup+joy", "glad"]
        assert step(found, Q0, "soup+joy").inputs[0] == StageTensor("soup", Q0, TensorSpec(DType.BF16, (32, 32)))
        assert found.stages["glad"].derivations == {}

    def test_an_adapter_of_another_base(self, zoo: Path, tmp_path: Path) -> None:
        def problems(base: dict[str, Any]) -> list[tuple[str, str]]:
            write_header(tmp_path / "base", base)
            text = self.TEXT.replace("joy", f"{zoo}/joy").replace("zen", f"{zoo}/zen")
            return [(error.code, error.message) for error in errors_of(planned, tmp_path, {}, text)]

        assert [code for code, _ in problems(llama(layers=1))] == ["KB306", "KB306"]
        wide = {**llama(), Q0: ("BF16", (48, 32))}
        (joy, zen) = problems(wide)
        assert joy[0] == zen[0] == "KB301"
        assert joy[1].startswith("model.layers.0.self_attn.q_proj: base has [48, 32], the adapter ")
        whole = {**llama(), Q0: ("I8", (32, 32))}
        assert [code for code, _ in problems(whole)] == ["KB311", "KB311"]

    def test_adapters_that_disagree_on_the_weights_layout(self, zoo: Path, tmp_path: Path) -> None:
        other = pico_adapter(tmp_path / "turned", zoo / "base", 4, targets=["q_proj"], fan_in_fan_out=True)
        (error,) = errors_of(plan, zoo, self.TEXT.replace("zen", str(other)))
        assert error.code == "KB310"

    def test_an_adapter_is_no_model_and_a_model_no_adapter(self, zoo: Path) -> None:
        assert found(plan, zoo, "merge_method: passthrough\nmodels: [{model: joy}]") == [
            ("KB307", f"{zoo}/recipe.yml:2:18")
        ]
        (error,) = errors_of(plan, zoo, self.TEXT.replace("joy", "a"))
        assert error.code == "KB307"
        (error,) = errors_of(plan, zoo, "merge_method: passthrough\nmodels: [{model: base+a}]")
        assert error.code == "KB307"


class TestChains:
    TEXT = """\
    kittybuild: 1
    stages:
      last: {merge_method: linear, parameters: {weight: 1}, models: [{model: mid}, {model: base}]}
      mid:
        merge_method: passthrough
        keep: false
        models: [{model: first, parameters: {scale: [{filter: q_proj, value: 2}]}}]
      first: {merge_method: linear, parameters: {weight: 1}, models: [{model: base}, {model: a}]}
      aside: {merge_method: passthrough, models: [{model: a}]}
    """

    def test_stages_come_in_the_order_of_building(self, zoo: Path) -> None:
        assert list(plan(zoo, self.TEXT, "last").stages) == ["first", "mid", "last"]

    def test_only_what_a_wanted_stage_needs_is_planned(self, zoo: Path) -> None:
        found = plan(zoo, self.TEXT, "mid")
        assert list(found.stages) == ["first", "mid"]
        assert [name for name, stage in found.stages.items() if stage.shards] == ["mid"]
        found = plan(zoo, self.TEXT, "last")
        assert len(found.stages["last"].steps) == len(found.stages["first"].steps) == 21
        assert list(found.stages["mid"].steps) == [Q0, Q0.replace("layers.0", "layers.1")]
        assert not found.stages["mid"].keep

    def test_what_is_taken_over_leads_to_whoever_made_it(self, zoo: Path) -> None:
        found = plan(zoo, self.TEXT, "last")
        spec = TensorSpec(DType.BF16, (32, 32))
        assert step(found, Q0, "last").inputs[0] == StageTensor("mid", Q0, spec)
        assert step(found, K0, "last").inputs[0] == StageTensor("first", K0, TensorSpec(DType.BF16, (16, 32)))
        assert found.step(StageTensor("mid", Q0, spec)) is found.stages["mid"].steps[Q0]

    def test_a_stage_of_which_nothing_is_needed_is_left_out(self, zoo: Path) -> None:
        text = """\
        kittybuild: 1
        stages:
          same: {merge_method: passthrough, models: [{model: base}]}
          soup: {merge_method: linear, parameters: {weight: 1}, models: [{model: same}, {model: a}]}
        """
        assert list(plan(zoo, text).stages) == ["soup"]

    def test_companions_and_config_come_from_the_base_through_all_stages(self, zoo: Path) -> None:
        found = plan(zoo, self.TEXT, "last")
        assert {stage.donor for stage in found.stages.values()} == {"base"}
        assert found.stages["last"].config == found.stages["first"].config

    def test_an_error_of_one_stage_is_not_told_again_by_the_next(self, zoo: Path) -> None:
        text = self.TEXT.replace("{model: a}]}\n      aside", "{model: lame}]}\n      aside")
        (error,) = errors_of(plan, zoo, text)
        assert error.code == "KB302"

    def test_errors_of_stages_side_by_side_are_told_together(self, zoo: Path) -> None:
        text = """\
        kittybuild: 1
        stages:
          one: {merge_method: linear, parameters: {weight: 1}, models: [{model: base}, {model: lame}]}
          two: {merge_method: slerp, base_model: base, parameters: {t: 1}, models: [{model: base}]}
        """
        assert [code for code, _ in found(plan, zoo, text)] == ["KB302", "KB309"]


class TestTargets:
    TEXT = """\
    kittybuild: 1
    stages:
      a: {merge_method: passthrough, models: [{model: base}]}
      b: {merge_method: passthrough, models: [{model: a}]}
      c: {kind: apply_lora, base: a, adapters: [{adapter: joy}]}
    """

    def test_without_outputs_it_is_what_no_other_stage_needs(self) -> None:
        assert targets(parse(self.TEXT), ()) == ("b", "c")

    def test_outputs_go_before_that_and_words_before_outputs(self) -> None:
        recipe = parse(self.TEXT + "outputs: {c: {folder: out}, a: {folder: other}}\n")
        assert targets(recipe, ()) == ("a", "c")
        assert targets(recipe, ("b",)) == ("b",)

    def test_a_stage_that_is_not_there(self) -> None:
        with pytest.raises(UsageError) as caught:
            targets(parse(self.TEXT), ("d",))
        assert (caught.value.code, caught.value.exit_status) == ("KB001", 2)


class TestShards:
    @staticmethod
    def sizes(limit: int, *sizes: int) -> list[int]:
        steps = {str(n): SourceTensor("s", str(n), TensorSpec(DType.U8, (size,))) for n, size in enumerate(sizes)}
        return [len(names) for names in shards_of(steps, limit)]

    def test_a_shard_is_closed_before_it_would_grow_too_large(self) -> None:
        assert self.sizes(10, 4, 4, 4, 4) == [2, 2]
        assert self.sizes(10, 5, 5, 1) == [2, 1]
        assert self.sizes(100, 5, 5, 1) == [3]

    def test_a_tensor_larger_than_a_shard_has_one_for_itself(self) -> None:
        assert self.sizes(10, 1, 50, 1) == [1, 1, 1]
        assert self.sizes(1, 50) == [1]

    def test_the_recipe_says_how_large(self, zoo: Path) -> None:
        text = """\
        kittybuild: 1
        stages: {s: {merge_method: passthrough, models: [{model: base}]}}
        outputs: {s: {folder: out, shard_size: 20KB}}
        """
        shards = plan(zoo, text).stages["s"].shards
        assert len(shards) == 3
        assert sum(shards, ()) == tuple(plan(zoo, text).stages["s"].steps)


class TestSources:
    def test_paths_count_from_the_recipes_folder_and_then_from_the_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("home/near", "work/near", "work/far"):
            write_header(tmp_path / name, llama())
        monkeypatch.chdir(tmp_path / "work")
        recipe = parse_recipe(
            "merge_method: linear\nmodels: [{model: near}, {model: far}]",
            str(tmp_path / "home/r.yml"),
            BUILTIN.catalogue(),
        )
        assert locate(recipe, source_names(recipe)) == {
            "near": str(tmp_path / "home/near"),
            "far": str(tmp_path / "work/far"),
        }

    def test_a_declared_name_goes_before_a_folder(self, zoo: Path) -> None:
        text = """\
        kittybuild: 1
        sources: {a: {path: base}}
        stages: {s: {merge_method: passthrough, models: [{model: a}]}}
        """
        found = plan(zoo, text)
        assert {given.source for given in found.stages["s"].steps.values() if isinstance(given, SourceTensor)} == {"a"}
        assert found.stages["s"].config == plan(zoo, text.replace("path: base", "path: ./base")).stages["s"].config

    def test_notes_of_a_source_are_the_plans(self, zoo: Path, tmp_path: Path) -> None:
        model = write_header(tmp_path / "model", llama())
        save_tensors(model / "more.safetensors", {})
        assert plan(zoo, f"merge_method: passthrough\nmodels: [{{model: {model}}}]").notes == (
            f"{model}: not read, since the weights are in other files: 'more.safetensors'",
        )

    def test_a_single_file_has_no_companions_to_give(self, zoo: Path) -> None:
        found = plan(zoo, "merge_method: passthrough\nmodels: [{model: base/model.safetensors}]")
        assert (found.stages["merge"].donor, found.stages["merge"].config) == (None, None)
