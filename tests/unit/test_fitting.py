"""Models that keep the same weights otherwise: heads, buffers, prefixes, experts. Nothing is lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from kittybuild.model.derivation import Derivation, SourceTensor, StageTensor, Step
from kittybuild.model.plan import Plan, inputs_of
from tests.planning import Header, errors_of, llama, planned, step

BOTH = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def inputs(given: Step) -> list[tuple[str, str]]:
    """From where each input comes."""
    return [(one.source if isinstance(one, SourceTensor) else one.stage, one.name) for one in inputs_of(given)]


def notes(plan: Plan) -> str:
    return "\n".join(plan.notes)


class TestHeads:
    def test_a_tied_model_merged_with_one_that_has_a_head_gives_its_embedding_as_its_head(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, {"a": llama(), "b": llama(tie=True)}, BOTH)
        assert inputs(step(plan, HEAD)) == [("a", HEAD), ("b", EMBEDDING)]
        assert f"b has {HEAD} as {EMBEDDING}, which stands in for it" in notes(plan)

    def test_the_head_of_the_last_slice_may_be_an_embedding(self, tmp_path: Path) -> None:
        text = """\
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 1]}]
          - sources: [{model: b, layer_range: [1, 2]}]
        """
        plan = planned(tmp_path, {"a": llama(), "b": llama(tie=True)}, text)
        assert inputs(plan.stages["merge"].steps[HEAD]) == [("b", EMBEDDING)]

    def test_a_head_that_a_tied_base_has_no_place_for_is_an_error_with_two_ways_out(self, tmp_path: Path) -> None:
        (error,) = errors_of(planned, tmp_path, {"a": llama(tie=True), "b": llama()}, BOTH)
        assert (error.code, error.message) == ("KB302", f"a lacks 1 tensor that b has:\n  {HEAD}")
        assert "make b the base, or write `ignore: [lm_head]`" in (error.hint or "")
        plan = planned(tmp_path, {}, BOTH + "ignore: [lm_head]")
        assert HEAD not in plan.stages["merge"].steps


INV: Header = {"model.layers.0.self_attn.rotary_emb.inv_freq": ("F32", (4,))}


class TestBuffers:
    @pytest.mark.parametrize(("having", "kept"), [("a", True), ("b", False)])
    def test_frequencies_that_one_model_lacks_are_no_error(self, tmp_path: Path, having: str, kept: bool) -> None:
        models = {name: {**llama(), **(INV if name == having else {})} for name in "ab"}
        plan = planned(tmp_path, models, BOTH)
        (name,) = INV
        assert (name in plan.stages["merge"].steps) is kept
        assert "every loader computes:\n  model.layers.0.self_attn.rotary_emb.inv_freq" in notes(plan)


class TestIgnore:
    def test_what_is_ignored_is_listed_and_left_out_of_all(self, tmp_path: Path) -> None:
        extra: Header = {"score.weight": ("BF16", (2, 32))}
        plan = planned(tmp_path, {"a": llama(), "b": {**llama(), **extra}}, BOTH + "ignore: ['re:^score']")
        assert "score.weight" not in plan.stages["merge"].steps
        assert "'ignore' leaves out 1 tensor of b:\n  score.weight" in notes(plan)

    def test_a_pattern_without_a_tensor_is_told(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, {"a": llama(), "b": llama()}, BOTH + "ignore: [scroe]")
        assert "the filter 'scroe' of 'ignore' takes no tensor" in notes(plan)

    def test_a_pattern_that_is_none_is_an_error(self, tmp_path: Path) -> None:
        (error,) = errors_of(planned, tmp_path, {"a": llama(), "b": llama()}, BOTH + "ignore: ['re:(']")
        assert error.code == "KB106"


class TestPrefixes:
    """A text merge goes into a model that sees: the rest of that model stays."""

    TEXT = """\
    merge_method: passthrough
    base_model: sees
    models: [{model: a, strip: model., add: model.language_model.}]
    take: base
    """

    def sees(self) -> Header:
        text = {name.replace("model.", "model.language_model."): spec for name, spec in llama().items()}
        return {**text, "model.visual.blocks.0.attn.qkv.weight": ("BF16", (8, 8))}

    def test_its_text_is_replaced_and_the_rest_taken(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, {"a": llama(), "sees": self.sees()}, self.TEXT)
        steps = plan.stages["merge"].steps
        assert steps.keys() == self.sees().keys()
        assert {source for name in steps if "visual" not in name for source, _ in inputs(steps[name])} == {"a"}
        assert inputs(steps["model.visual.blocks.0.attn.qkv.weight"])[0][0] == "sees"
        assert "taken from sees as it is: 1 tensor" in notes(plan)

    def test_a_method_with_a_base_merges_what_others_have(self, tmp_path: Path) -> None:
        text = self.TEXT.replace("passthrough", "task_arithmetic\n    parameters: {weight: 1}")
        plan = planned(tmp_path, {"a": llama(), "sees": self.sees()}, text)
        assert inputs(step(plan, HEAD)) == [("sees", HEAD), ("a", HEAD)]
        assert "model.visual.blocks.0.attn.qkv.weight" in plan.stages["merge"].steps

    def test_what_only_some_models_lack_is_still_an_error(self, tmp_path: Path) -> None:
        text = self.TEXT.replace("passthrough", "ties\n    parameters: {weight: 1}")
        text = text.replace("models: [", "models: [{model: other}, ")
        models = {"a": llama(), "sees": self.sees(), "other": self.sees()}
        assert [error.code for error in errors_of(planned, tmp_path, models, text)] == ["KB302"]

    def test_what_the_base_has_no_place_for_is_an_error(self, tmp_path: Path) -> None:
        models = {"a": {**llama(), "score.weight": ("BF16", (2, 2))}, "sees": self.sees()}
        (error,) = errors_of(planned, tmp_path, models, self.TEXT)
        assert error.message == "sees lacks 1 tensor that a has:\n  score.weight"

    def test_other_shapes_than_the_base_has_are_an_error(self, tmp_path: Path) -> None:
        (first, second) = (EMBEDDING.replace("model.", "model.language_model."), HEAD)
        models = {"a": llama(vocab=70), "sees": self.sees()}
        (error,) = errors_of(planned, tmp_path, models, self.TEXT)
        assert error.code == "KB301"
        assert first in error.message
        assert second in error.message

    def test_a_prefix_that_no_name_has_is_told(self, tmp_path: Path) -> None:
        plan = planned(tmp_path, {"a": llama(), "b": llama()}, BOTH.replace("{model: b}", "{model: b, strip: x.}"))
        assert "no tensor of b begins with 'x.'" in notes(plan)

    def test_taking_from_no_base_is_an_error(self, tmp_path: Path) -> None:
        (error,) = errors_of(planned, tmp_path, {"a": llama(), "b": llama()}, BOTH + "take: base")
        assert (error.code, error.message) == ("KB103", "'take: base' needs a base_model")


STEM = "model.layers.0.mlp.experts"
FUSED: Header = {
    f"{STEM}.gate_up_proj": ("BF16", (2, 6, 4)),
    f"{STEM}.down_proj": ("BF16", (2, 4, 3)),
    "model.layers.0.mlp.gate.weight": ("BF16", (2, 4)),
}


def split(words: tuple[str, str, str], stem: str = STEM) -> Header:
    gate, up, down = words
    shapes = {gate: (3, 4), up: (3, 4), down: (4, 3)}
    router = stem.replace("experts", "gate.weight")
    matrices = {f"{stem}.{e}.{word}.weight": ("BF16", shapes[word]) for e in (0, 1) for word in words}
    return {**matrices, router: ("BF16", (2, 4))}


HF = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


class TestExperts:
    @pytest.mark.parametrize(
        ("words", "stem"), [(HF, STEM), (MIXTRAL, STEM.replace("mlp", "block_sparse_moe"))], ids=["hf", "mixtral"]
    )
    def test_a_fused_base_gets_split_experts_end_to_end(
        self, tmp_path: Path, words: tuple[str, str, str], stem: str
    ) -> None:
        plan = planned(tmp_path, {"a": FUSED, "b": split(words, stem)}, BOTH)
        assert plan.stages["merge"].steps.keys() == FUSED.keys()
        (label,) = [name for name in plan.stages if name != "merge"]
        join = step(plan, f"{STEM}.gate_up_proj", label)
        assert join.builder == "join"
        gate, up, _ = words
        wanted = [f"{stem}.{expert}.{word}.weight" for expert in (0, 1) for word in (gate, up)]
        assert [name for _, name in inputs(join)] == wanted
        assert not plan.stages[label].keep

    @pytest.mark.parametrize(
        ("words", "stem"), [(HF, STEM), (MIXTRAL, STEM.replace("mlp", "block_sparse_moe"))], ids=["hf", "mixtral"]
    )
    def test_a_split_base_gets_parts_of_a_fused_file(
        self, tmp_path: Path, words: tuple[str, str, str], stem: str
    ) -> None:
        base = split(words, stem)
        plan = planned(tmp_path, {"a": base, "b": FUSED}, BOTH)
        assert list(plan.stages) == ["merge"]
        assert plan.stages["merge"].steps.keys() == base.keys()
        _, up, down = words
        assert inputs(step(plan, f"{stem}.1.{up}.weight"))[1] == ("b", f"{STEM}.gate_up_proj#36:3x4")
        assert inputs(step(plan, f"{stem}.1.{down}.weight"))[1] == ("b", f"{STEM}.down_proj#12:4x3")

    def test_a_stage_with_fused_experts_is_cut(self, tmp_path: Path) -> None:
        text = """\
        kittybuild: 1
        stages:
          soup: {merge_method: linear, parameters: {weight: 1}, models: [{model: b}, {model: c}]}
          last: {merge_method: linear, parameters: {weight: 1}, models: [{model: a}, {model: soup}]}
        """
        plan = planned(tmp_path, {"a": split(HF), "b": FUSED, "c": FUSED}, text)
        drv = step(plan, f"{STEM}.0.up_proj.weight", "last")
        assert isinstance(drv.inputs[1], StageTensor)
        cut = plan.step(drv.inputs[1])
        assert isinstance(cut, Derivation)
        assert (cut.builder, cut.params) == ("cut", {"start": 12})

    @pytest.mark.parametrize("order", ["fused", "split"])
    def test_another_number_of_experts_is_an_error(self, tmp_path: Path, order: str) -> None:
        more = {name.replace(".1.", ".2."): spec for name, spec in split(HF).items()}
        models = {"a": FUSED, "b": {**split(HF), **more}}
        if order == "split":
            models = {"a": models["b"], "b": FUSED}
        codes = {error.code for error in errors_of(planned, tmp_path, models, BOTH)}
        assert codes == {"KB302"}
