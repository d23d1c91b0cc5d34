"""Adapters made, merged and applied: the laws that bind extract_lora, merge_adapters and apply_lora.

PEFT loads every adapter that we make, and computes the logits of the model that we make of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.building import Answer, build, fails
from tests.helpers import load_tensors, pico_adapter, pico_llama, save_tensors, write_json, write_model, write_recipe

Q0 = "model.layers.0.self_attn.q_proj"
SIX = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune of it, the same with tied embeddings, and adapters."""
    folder = tmp_path_factory.mktemp("zoo")
    pico_llama(folder / "base", 1, dtype="float32")
    pico_llama(folder / "tuned", 2, base=folder / "base")
    pico_llama(folder / "tied", 3, dtype="float32", tie=True)
    pico_llama(folder / "tied-tuned", 4, base=folder / "tied")
    pico_adapter(folder / "joy", folder / "base", 5)
    pico_adapter(folder / "zen", folder / "base", 6, rank=2, targets=["q_proj", "o_proj"], lora_alpha=3)
    pico_adapter(folder / "calm", folder / "base", 7, use_rslora=True)
    return folder


def made(zoo: Path, tmp_path: Path, outputs: str, **stages: str) -> tuple[Path, Answer]:
    """Build these stages in a folder beside the zoo's; the outputs are folders by the names of their stages."""
    sources = {path.name: {"path": str(path)} for path in sorted(zoo.iterdir())}
    lines = "\n".join(f"  {name}: {text}" for name, text in stages.items())
    folders = "\n".join(f"  {name}: {{folder: {name}}}" for name in outputs.split())
    text = f"kittybuild: 1\nsources: {json.dumps(sources)}\nstages:\n{lines}\noutputs:\n{folders}\n"
    return tmp_path, build(write_recipe(tmp_path, text), "--store", tmp_path / "store")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(2, 30)[None]).logits
    return found


def of_model(folder: Path) -> Tensor:
    transformers = pytest.importorskip("transformers")
    return logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def of_peft(base: Path, adapter: Path, *, merged: bool = False) -> Tensor:
    """The logits of the base with the adapter on it, as PEFT computes them; all its tensors must have a place."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.MonkeyPatch.context():
        found = peft.PeftModel.from_pretrained(model, str(adapter))
    loaded = peft.set_peft_model_state_dict(found, load_tensors(adapter))
    assert not loaded.unexpected_keys
    return logits(found.merge_and_unload() if merged else found)


def extraction(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "extraction.json").read_text(encoding="utf-8")))


def difference(zoo: Path, module: str) -> Tensor:
    """What the fine-tune changes of a weight."""
    sides = (load_tensors(zoo / name)[f"{module}.weight"].double() for name in ("tuned", "base"))
    first, second = sides
    return first - second


EXTRACT = "{kind: extract_lora, model: tuned, base: base, "


@pytest.mark.parametrize("more", ["", "float64: true, ", "distribute_scale: false, ", "svd: randomized, "])
def test_extracted_whole_and_applied_the_fine_tune_is_back(zoo: Path, tmp_path: Path, more: str) -> None:
    folder, _ = made(
        zoo,
        tmp_path,
        "delta back",
        delta=f"{EXTRACT}{more} rank: {{most: 64}}, embeddings: lora}}",
        back="{kind: apply_lora, base: base, adapters: [{adapter: delta}]}",
    )
    tuned, back = load_tensors(zoo / "tuned"), load_tensors(folder / "back")
    assert tuned.keys() == back.keys()
    for name, tensor in tuned.items():
        assert torch.allclose(back[name], tensor, rtol=0, atol=2e-7), name
    assert extraction(folder / "delta")["kept_energy"] == pytest.approx(1, abs=1e-9)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("base", "tuned", "more"),
    [
        ("base", "tuned", "rank: 4"),
        ("base", "tuned", "rank: 4, embeddings: lora, distribute_scale: false"),
        ("base", "tuned", "rank: {most: 16, energy: 0.6}, include: [self_attn], others: leave"),
        ("base", "tuned", "rank: 3, include: ['layers.1'], modules_to_save: [up_proj]"),
        ("tied", "tied-tuned", "rank: 4, embeddings: lora, others: leave"),
        ("tied", "tied-tuned", "rank: 4, embeddings: save"),
    ],
)
def test_peft_computes_the_logits_of_our_merged_model(
    zoo: Path, tmp_path: Path, base: str, tuned: str, more: str
) -> None:
    folder, _ = made(
        zoo,
        tmp_path,
        "delta back",
        delta=f"{{kind: extract_lora, model: {tuned}, base: {base}, {more}}}",
        back=f"{{kind: apply_lora, base: {base}, adapters: [{{adapter: delta}}]}}",
    )
    ours = of_model(folder / "back")
    assert torch.allclose(of_peft(zoo / base, folder / "delta"), ours, atol=2e-5)
    assert not torch.allclose(of_model(zoo / base), ours, atol=1e-2)


def test_the_residual_shrinks_with_the_rank_as_the_singular_values_say(zoo: Path, tmp_path: Path) -> None:
    values = torch.linalg.svdvals(difference(zoo, Q0))
    energy = (values**2).sum()
    for rank in (1, 2, 7, 16, 31, 32):
        folder, _ = made(
            zoo,
            tmp_path / str(rank),
            "delta back",
            delta=f"{EXTRACT}rank: {rank}, include: [self_attn.q_proj], float64: true, out_dtype: float64}}",
            back="{kind: apply_lora, base: base, adapters: [{adapter: delta}], out_dtype: float64}",
        )
        told = extraction(folder / "delta")["modules"][Q0]
        rest = (values[rank:] ** 2).sum()
        assert told["rank"] == rank
        assert told["residual_norm"] == pytest.approx(float(rest.sqrt()), rel=1e-9, abs=1e-9)
        assert told["kept_energy"] == pytest.approx(float(1 - rest / energy), abs=1e-12)
        left = load_tensors(zoo / "tuned")[f"{Q0}.weight"].double() - load_tensors(folder / "back")[f"{Q0}.weight"]
        assert float(left.norm()) == pytest.approx(float(rest.sqrt()), rel=1e-6, abs=1e-9)


def test_ranks_by_energy_and_threshold_are_the_least_that_do(zoo: Path, tmp_path: Path) -> None:
    folder, _ = made(
        zoo,
        tmp_path,
        "energy threshold",
        energy=f"{EXTRACT}rank: {{most: 32, energy: 0.7}}, include: [self_attn.q_proj]}}",
        threshold=f"{EXTRACT}rank: {{most: 32, threshold: 0.15}}, include: [self_attn.q_proj]}}",
    )
    for layer in (0, 1):
        module = f"model.layers.{layer}.self_attn.q_proj"
        values = torch.linalg.svdvals(difference(zoo, module))
        shares = (values**2).cumsum(0) / (values**2).sum()
        assert extraction(folder / "energy")["modules"][module]["rank"] == int((shares < 0.7).sum()) + 1
        assert extraction(folder / "threshold")["modules"][module]["rank"] == int((values > 0.15).sum())
    config = json.loads((folder / "energy" / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = {
        name.split(".lora_A")[0]: len(a) for name, a in load_tensors(folder / "energy").items() if "lora_A" in name
    }
    wanted = {f"base_model.model.{module}": rank for module, rank in config["rank_pattern"].items()}
    assert ranks == {name: wanted.get(name, config["r"]) for name in ranks}


def test_signs_and_order_are_canonical(zoo: Path, tmp_path: Path) -> None:
    folder, _ = made(zoo, tmp_path, "delta", delta=f"{EXTRACT}rank: 8, include: [self_attn.q_proj]}}")
    b = load_tensors(folder / "delta")[f"base_model.model.{Q0}.lora_B.weight"]
    largest = b.gather(0, b.abs().argmax(dim=0, keepdim=True))
    assert (largest > 0).all()
    assert b.norm(dim=0).diff().max() < 0


def test_one_layer_of_the_fine_tune_changed_one_layer_is_extracted_again(zoo: Path, tmp_path: Path) -> None:
    stages = {"delta": f"{EXTRACT}rank: 4, include: [self_attn, mlp]}}"}
    _, first = made(zoo, tmp_path, "delta", **stages)
    assert first["stages"]["delta/factors"]["computed"] == 14
    tensors = load_tensors(zoo / "tuned")
    config = json.loads((zoo / "tuned" / "config.json").read_text(encoding="utf-8"))
    other = {name: t + 0.01 if name == f"{Q0}.weight" else t for name, t in tensors.items()}
    write_model(tmp_path / "changed", other, config)
    stages = {"delta": stages["delta"].replace("model: tuned", f"model: {tmp_path / 'changed'}")}
    _, again = made(zoo, tmp_path, "delta", **stages)
    assert {name: stage["computed"] for name, stage in again["stages"].items()} == {
        "delta/factors": 1,
        "delta/spectra": 1,
        "delta": 2,
    }


APPLY = "{kind: apply_lora, base: base, adapters: "


def close(first: Path, second: Path, atol: float = 2e-6) -> bool:
    one, two = load_tensors(first), load_tensors(second)
    return one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=atol) for name in one)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "how", ["method: cat", "method: linear", "method: svd, rank: {most: 12}", "method: linear, rank: {most: 9}"]
)
def test_merged_then_applied_is_applied_then_merged_where_the_method_is_linear(
    zoo: Path, tmp_path: Path, how: str
) -> None:
    uses = "[{adapter: joy, weight: 0.7}, {adapter: zen, weight: -1.5}, {adapter: calm}]"
    folder, _ = made(
        zoo,
        tmp_path,
        "one merged whole",
        one=f"{{kind: merge_adapters, {how}, adapters: {uses}}}",
        merged=f"{APPLY}[{{adapter: one}}]}}",
        whole=f"{APPLY}{uses}}}",
    )
    assert close(folder / "merged", folder / "whole", atol=2e-6 if "9" not in how else 1.0)
    assert torch.allclose(of_peft(zoo / "base", folder / "one"), of_model(folder / "merged"), atol=5e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_in_the_space_of_factors_it_is_what_peft_makes(zoo: Path, tmp_path: Path, method: str) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder, _ = made(
        zoo,
        tmp_path,
        "one",
        one=f"{{kind: merge_adapters, method: {method}, space: factors, density: 0.5, adapters:"
        " [{adapter: joy, weight: 0.7}, {adapter: calm, weight: 0.35}]}",
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(zoo / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(zoo / "joy"), adapter_name="joy")
    model.load_adapter(str(zoo / "calm"), adapter_name="calm")
    more = {"density": 0.5} if method == "ties" else {}
    model.add_weighted_adapter(["joy", "calm"], [0.7, 0.35], "both", combination_type=method, **more)
    model.set_adapter("both")
    assert torch.allclose(of_peft(zoo / "base", folder / "one"), logits(model), atol=2e-5)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_differences_merged_element_by_element_are_those_of_the_applied_models(
    zoo: Path, tmp_path: Path, method: str
) -> None:
    uses = "[{adapter: joy}, {adapter: calm}]"
    folder, _ = made(
        zoo,
        tmp_path,
        "one merged",
        one=f"{{kind: merge_adapters, method: {method}, density: 0.6, rank: {{most: 64}}, adapters: {uses}}}",
        merged=f"{APPLY}[{{adapter: one}}]}}",
    )
    found = load_tensors(folder / "merged")[f"{Q0}.weight"] - load_tensors(zoo / "base")[f"{Q0}.weight"]
    kept = float((found.abs() > 1e-6).float().mean())
    assert 0.5 < kept < 0.95, "each element is kept by one of two adapters at least, or by none"


def dora(zoo: Path, folder: Path) -> Path:
    """An adapter with magnitude vectors, as PEFT saves it."""
    pico_adapter(folder, zoo / "base", 8, use_dora=True)
    tensors = load_tensors(folder)
    weights = load_tensors(zoo / "base")
    for name in [name for name in tensors if ".lora_A" in name]:
        module = name.removeprefix("base_model.model.").split(".lora_A")[0]
        norms = weights[f"{module}.weight"].norm(dim=1)
        tensors[name.replace("lora_A.weight", "lora_magnitude_vector")] = norms * torch.linspace(0.8, 1.3, len(norms))
    save_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def qwen(folder: Path, seed: int) -> dict[str, Tensor]:
    """A pico Qwen2, whose attention has biases."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.Qwen2ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return load_tensors(folder)


class TestWhatAdaptersHold:
    @pytest.mark.filterwarnings("ignore")
    def test_dora(self, zoo: Path, tmp_path: Path) -> None:
        adapter = dora(zoo, tmp_path / "dora")
        folder, _ = made(zoo, tmp_path, "whole", whole=f"{APPLY}[{{adapter: {adapter}}}]}}")
        assert torch.allclose(of_peft(zoo / "base", adapter), of_model(folder / "whole"), atol=2e-5)

    def test_half_of_dora_is_half_of_the_difference(self, zoo: Path, tmp_path: Path) -> None:
        adapter = dora(zoo, tmp_path / "dora")
        folder, _ = made(
            zoo,
            tmp_path,
            "whole half both",
            whole=f"{APPLY}[{{adapter: {adapter}}}]}}",
            half=f"{APPLY}[{{adapter: {adapter}, weight: 0.5}}]}}",
            both=f"{APPLY}[{{adapter: {adapter}}}, {{adapter: joy, weight: 2}}]}}",
        )
        base, whole, half, both = (
            load_tensors(path)[f"{Q0}.weight"]
            for path in (zoo / "base", *(folder / n for n in ("whole", "half", "both")))
        )
        assert torch.allclose(half, (base + whole) / 2, atol=1e-6)
        a, b = (load_tensors(zoo / "joy")[f"base_model.model.{Q0}.lora_{side}.weight"] for side in "AB")
        assert torch.allclose(both, whole + 2 * 2 * b @ a, atol=2e-6)

    @pytest.mark.filterwarnings("ignore")
    def test_biases(self, tmp_path: Path) -> None:
        zoo = tmp_path / "zoo"
        qwen(zoo / "base", 1)
        qwen(zoo / "tuned", 2)
        folder, _ = made(
            zoo,
            tmp_path,
            "delta back",
            delta=f"{EXTRACT}rank: {{most: 64}}, embeddings: lora}}",
            back=f"{APPLY}[{{adapter: delta}}]}}",
        )
        assert close(folder / "back", zoo / "tuned")
        assert torch.allclose(of_peft(zoo / "base", folder / "delta"), of_model(zoo / "tuned"), atol=2e-5)

    def test_modules_saved_whole_count_by_their_weight(self, zoo: Path, tmp_path: Path) -> None:
        adapter = pico_adapter(tmp_path / "saved", zoo / "base", 9, modules_to_save=["lm_head"])
        tensors = load_tensors(adapter)
        head = load_tensors(zoo / "tuned")["lm_head.weight"]
        save_tensors(adapter / "adapter_model.safetensors", {**tensors, "base_model.model.lm_head.weight": head})
        folder, _ = made(
            zoo,
            tmp_path,
            "whole part",
            whole=f"{APPLY}[{{adapter: {adapter}}}]}}",
            part=f"{APPLY}[{{adapter: {adapter}, weight: 0.25}}]}}",
        )
        base = load_tensors(zoo / "base")["lm_head.weight"]
        assert load_tensors(folder / "whole")["lm_head.weight"].equal(head)
        assert torch.allclose(load_tensors(folder / "part")["lm_head.weight"], 0.75 * base + 0.25 * head, atol=1e-6)


def test_convolutions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    base = {"conv.weight": torch.randn(8, 4, 3, 3, generator=generator), "conv.bias": torch.zeros(8)}
    tuned = {
        "conv.weight": base["conv.weight"] + torch.randn(8, 4, 3, 3, generator=generator),
        "conv.bias": torch.ones(8),
    }
    for name, tensors in (("base", base), ("tuned", tuned)):
        write_model(tmp_path / "zoo" / name, tensors)
        write_json(tmp_path / "zoo" / name / "config.json", {"model_type": "toy"})
    folder, _ = made(
        tmp_path / "zoo",
        tmp_path,
        "delta back",
        delta=f"{EXTRACT}rank: 8}}",
        back=f"{APPLY}[{{adapter: delta}}]}}",
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in load_tensors(folder / "delta").items()}
    assert shapes["base_model.model.conv.lora_A.weight"] == (8, 4, 3, 3)
    assert shapes["base_model.model.conv.lora_B.weight"] == (8, 8, 1, 1)
    assert close(folder / "back", tmp_path / "zoo" / "tuned")


def test_a_chain_kept_and_fused_gives_the_same_bits(zoo: Path, tmp_path: Path) -> None:
    def manifest(keep: str) -> Mapping[str, Any]:
        _, done = made(
            zoo,
            tmp_path / keep,
            "delta",
            glad=f"{{keep: {keep}, kind: apply_lora, base: base, adapters: [{{adapter: joy}}]}}",
            soup=f"{{keep: {keep}, merge_method: linear, models: [{{model: glad, parameters: {{weight: 1}}}},"
            " {model: tuned, parameters: {weight: 1}}]}",
            delta="{kind: extract_lora, model: soup, base: base, rank: 4}",
        )
        return dict(done["stages"]["delta"])

    assert manifest("true")["manifest"] == manifest("false")["manifest"]


def test_a_randomized_method_keeps_nearly_all_that_an_exact_one_keeps(tmp_path: Path) -> None:
    for seed, name in ((1, "base"), (2, "tuned")):
        tensors = {"a.weight": torch.randn(900, 800, generator=torch.Generator().manual_seed(seed)) / seed}
        write_model(tmp_path / "zoo" / name, tensors)
        write_json(tmp_path / "zoo" / name / "config.json", {"model_type": "toy"})
    kept = []
    for how in ("exact", "randomized"):
        few = f"{EXTRACT}rank: 8, svd: {how}, iterations: 6}}"
        folder, _ = made(tmp_path / "zoo", tmp_path / how, "delta", delta=few)
        kept.append(extraction(folder / "delta")["kept_energy"])
    assert kept[1] != kept[0]
    assert kept[1] == pytest.approx(kept[0], rel=2e-3)


@pytest.mark.parametrize(
    ("stage", "code", "words"),
    [
        (f"{EXTRACT}rank: 40}}", "KB360", "rank 40 is above that of"),
        (f"{EXTRACT}rank: 4, include: [nothing]}}", "KB361", "no module that differs"),
        (f"{EXTRACT}rank: 4, include: ['(']}}", "KB103", "is no pattern"),
        ("{kind: extract_lora, model: tied, base: joy, rank: 4}", "KB307", "joy is an adapter"),
        ("{kind: merge_adapters, method: svd, adapters: [{adapter: joy}]}", "KB103", "needs a rank"),
        ("{kind: merge_adapters, method: cat, adapters: [{adapter: base}]}", "KB307", "base is not an adapter"),
        (
            "{kind: merge_adapters, method: linear, space: factors, adapters: [{adapter: joy}, {adapter: zen}]}",
            "KB364",
            "factors of other ranks",
        ),
    ],
)
def test_what_cannot_be_is_told_in_the_plan(zoo: Path, tmp_path: Path, stage: str, code: str, words: str) -> None:
    sources = {path.name: {"path": str(path)} for path in sorted(zoo.iterdir())}
    text = f"kittybuild: 1\nsources: {json.dumps(sources)}\nstages:\n  delta: {stage}\n"
    _, found, error = fails(write_recipe(tmp_path, text), "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert found == code
    assert words in error["message"]
    assert error["hint"]
