"""PEFT adapters: the factors and scales that PEFT itself would use, and everything else refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kittybuild.checkpoint.adapter import Adapter, read_adapter, read_adapter_folder
from kittybuild.errors import SourceError
from tests.helpers import load_tensors, pico_adapter, pico_llama, save_tensors, write_json

Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"
V0 = "model.layers.0.self_attn.v_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pico_llama(tmp_path_factory.mktemp("models") / "base", 1, dtype="float32")


def read(folder: Path) -> Adapter:
    return read_adapter(read_adapter_folder(str(folder)))


def refused(folder: Path, code: str) -> str:
    with pytest.raises(SourceError) as caught:
        read(folder)
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value.message


def change(folder: Path, **config: Any) -> Path:
    """The adapter with other words in its config, and the same factors."""
    path = folder / "adapter_config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **config})
    return folder


def factors(folder: Path, **named: tuple[int, ...]) -> Path:
    """An adapter with factors of these names (`__` for a point) and shapes."""
    folder.mkdir()
    names = {name.replace("__", "."): torch.zeros(shape) for name, shape in named.items()}
    save_tensors(folder / "adapter_model.safetensors", names)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    return folder


class TestScales:
    def test_alpha_over_rank(self, base: Path, tmp_path: Path) -> None:
        adapter = read(pico_adapter(tmp_path / "a", base, 2, rank=4, lora_alpha=6))
        assert set(adapter.modules) == {
            f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
        }
        assert {pair.scale for pair in adapter.modules.values()} == {1.5}
        assert adapter.modules[V0].a.spec.shape == (4, 32)
        assert adapter.modules[V0].b.spec.shape == (16, 4)
        assert not adapter.transposed

    def test_alpha_over_the_root_of_the_rank(self, base: Path, tmp_path: Path) -> None:
        adapter = read(pico_adapter(tmp_path / "a", base, 2, rank=4, lora_alpha=6, use_rslora=True))
        assert adapter.modules[Q0].scale == 6 / math.sqrt(4)

    def test_without_an_alpha_it_is_pefts_default(self, base: Path, tmp_path: Path) -> None:
        folder = pico_adapter(tmp_path / "a", base, 2, rank=4)
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        write_json(folder / "adapter_config.json", {key: config[key] for key in ("peft_type", "r")})
        assert read(folder).modules[Q0].scale == 2.0

    def test_fan_in_fan_out(self, base: Path, tmp_path: Path) -> None:
        adapter = read(pico_adapter(tmp_path / "a", base, 2, fan_in_fan_out=True))
        assert adapter.transposed
        assert adapter.modules[V0].a.spec.shape == (4, 16)

    PATTERNS = (
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "q_proj": 8}},
        {"alpha_pattern": {"v_proj": 3}},
        {"alpha_pattern": {"proj": 3}},
        {"alpha_pattern": {"v_pro": 3}},
        {"alpha_pattern": {r".*0.*[qv]_proj": 3, "q_proj": 5}},
        {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3}},
        {"alpha_pattern": {"^layers.1.self_attn.q_proj": 3}},
        {"alpha_pattern": {"q_proj|v_proj": 3}},
        {"alpha_pattern": {"self_attn": 3}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 7}, "use_rslora": True},
    )

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("config", PATTERNS, ids=str)
    def test_every_scale_is_the_one_that_peft_uses(self, base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        folder = pico_adapter(tmp_path / "a", base, 2, **config)
        with torch.device("meta"):
            empty = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(base))
            theirs = peft.PeftModel(empty, peft.LoraConfig.from_pretrained(str(folder)))
        wanted = {
            name.removeprefix("base_model.model."): module.scaling["default"]
            for name, module in theirs.named_modules()
            if isinstance(getattr(module, "scaling", None), dict) and module.scaling
        }
        assert {name: pair.scale for name, pair in read(folder).modules.items()} == wanted


class TestNames:
    @pytest.mark.parametrize(
        "name",
        [
            "base_model.model.{module}.lora_{side}.weight",
            "base_model.model.{module}.lora_{side}.default.weight",
            "{module}.lora_{side}.weight",
        ],
    )
    def test_the_ways_to_write_a_factor(self, base: Path, tmp_path: Path, name: str) -> None:
        folder = pico_adapter(tmp_path / "a", base, 2)
        tensors = load_tensors(folder)
        renamed = {}
        for old, tensor in tensors.items():
            module, _, rest = old.removeprefix("base_model.model.").partition(".lora_")
            renamed[name.format(module=module, side=rest[0])] = tensor
        save_tensors(folder / "adapter_model.safetensors", renamed)
        assert Q0 in read(folder).modules

    def test_two_adapters_in_one_file_are_refused(self, tmp_path: Path) -> None:
        folder = factors(
            tmp_path / "a", q__lora_A__one__weight=(2, 4), q__lora_A__two__weight=(2, 4), q__lora_B__one__weight=(4, 2)
        )
        assert "two adapters are in one file: 'q.lora_A.two.weight'" in refused(folder, "KB207")

    @pytest.mark.parametrize(
        "name",
        [
            "lm_head__weight",
            "q__lora_magnitude",
            "wte__lora_embedding_C",
            "q__lora_A__bias",
            "lora_A__weight",
            "q__bias",
        ],
    )
    def test_what_is_no_factor_is_refused_by_name(self, tmp_path: Path, name: str) -> None:
        folder = factors(tmp_path / "a", q__lora_A__weight=(2, 4), q__lora_B__weight=(4, 2), **{name: (2, 2)})
        assert repr(name.replace("__", ".")) in refused(folder, "KB207")

    def test_an_adapter_without_factors_is_refused(self, tmp_path: Path) -> None:
        assert "holds no factors" in refused(factors(tmp_path / "a"), "KB207")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable tokens"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "activated LoRA"),
        ({"use_qalora": True}, "QALoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ({"use_qalora": True, "bias": "some"}, "bias 'some', QALoRA"),
    ],
)
def test_what_we_cannot_apply_exactly_is_refused_by_name(
    base: Path, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    message = refused(pico_adapter(tmp_path / "a", base, 2, **config), "KB207")
    assert f"the adapter uses {words}, which we cannot apply yet" in message


@pytest.mark.parametrize(
    "config", [{"init_lora_weights": "gaussian"}, {"init_lora_weights": True}, {"bias": None}, {"modules_to_save": []}]
)
def test_what_changes_nothing_is_taken(base: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    assert len(read(pico_adapter(tmp_path / "a", base, 2, **config)).modules) == 4


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"q__lora_A__weight": (2, 4)}, "one of lora_A and lora_B is missing"),
        ({"q__lora_B__weight": (4, 2)}, "one of lora_A and lora_B is missing"),
        ({"q__lora_A__weight": (2, 4), "q__lora_B__weight": (4, 3)}, "do not fit each other"),
        ({"q__lora_A__weight": (2,), "q__lora_B__weight": (4, 2)}, "do not fit each other"),
        ({"q__lora_A__weight": (2, 4, 3, 3), "q__lora_B__weight": (4, 2, 3, 1)}, "do not fit each other"),
        ({"q__lora_A__weight": (3, 4), "q__lora_B__weight": (4, 3)}, "have rank 3, the config says 2"),
    ],
)
def test_factors_that_do_not_fit(tmp_path: Path, named: dict[str, tuple[int, ...]], words: str) -> None:
    message = refused(factors(tmp_path / "a", **named), "KB208")
    assert message.startswith("q: ")
    assert words in message


def test_factors_of_integers_do_not_fit(tmp_path: Path) -> None:
    folder = factors(tmp_path / "a", q__lora_A__weight=(2, 4), q__lora_B__weight=(4, 2))
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_tensors(folder).items()}
    save_tensors(folder / "adapter_model.safetensors", tensors)
    assert "not both of floating point" in refused(folder, "KB208")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"lora_alpha": "8"}, "lora_alpha '8' over rank 2 is no scale"),
        ({"lora_alpha": True}, "is no scale"),
        ({"lora_alpha": float("nan")}, "is no scale"),
        ({"lora_alpha": float("inf")}, "is no scale"),
        ({"lora_alpha": 10**400}, "is no scale"),
        ({"lora_alpha": None}, "is no scale"),
        ({"r": "2"}, "the config says '2'"),
        ({"rank_pattern": {"(.+)+!": 2}}, "repeats too much"),
        ({"alpha_pattern": {".*.*.*.*!": 2}}, "repeats too much"),
        ({"alpha_pattern": {r"(.)\1": 2}}, "repeats too much"),
        ({"rank_pattern": {"q(": 2}}, "a pattern of the config cannot be used"),
        ({"alpha_pattern": {"q{99999999999}": 2}}, "a pattern of the config cannot be used"),
    ],
)
def test_a_config_that_gives_no_scale(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    folder = change(factors(tmp_path / "a", q__lora_A__weight=(2, 4), q__lora_B__weight=(4, 2)), **config)
    assert words in refused(folder, "KB208")


def test_files_that_are_not_there_or_damaged(base: Path, tmp_path: Path) -> None:
    folder = pico_adapter(tmp_path / "a", base, 2)
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    refused(folder, "KB206")
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, "KB205")


def test_pickled_factors_are_the_same_adapter(base: Path, tmp_path: Path) -> None:
    folder = pico_adapter(tmp_path / "a", base, 2)
    saved = read(folder)
    torch.save(load_tensors(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    pickled = read(folder)
    assert {m: (f.a.spec, f.b.spec, f.scale) for m, f in pickled.modules.items()} == {
        m: (f.a.spec, f.b.spec, f.scale) for m, f in saved.modules.items()
    }


def test_a_link_out_of_the_folder_is_refused(base: Path, tmp_path: Path) -> None:
    folder = pico_adapter(tmp_path / "a", base, 2)
    (folder / "adapter_model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "KB204")
