"""GGUF files as sources: Hugging Face names, shapes, rows and config over the bytes that llama.cpp stores.

Every tensor of a file is an entry, or in its config, or in a note; one that is unknown is an error.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kittybuild.checkpoint import gguf_tokenizer
from kittybuild.checkpoint.gguf_header import OTHER_FILES, Header, read_header
from kittybuild.checkpoint.gguf_tokenizer import json_bytes
from kittybuild.checkpoint.source import RAW, Checkpoint, Companion, Entry
from kittybuild.errors import SourceError, nearest
from kittybuild.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

_PIECE = 1 << 16  # elements decoded at a time: the temporaries stay in cache
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_THETA = 10000.0  # what llama.cpp assumes
# Names, and sides: V vocabulary, H hidden, F feed-forward, Q and K all query and all key heads, D one head.
_OUTER = MappingProxyType(
    {
        "token_embd": ("model.embed_tokens", "VH"),
        "output_norm": ("model.norm", "H"),
        "output": ("lm_head", "VH"),
    }
)
_LAYER = MappingProxyType(
    {
        "attn_norm": ("input_layernorm", "H"),
        "attn_q": ("self_attn.q_proj", "QH"),
        "attn_k": ("self_attn.k_proj", "KH"),
        "attn_v": ("self_attn.v_proj", "KH"),
        "attn_output": ("self_attn.o_proj", "HQ"),
        "attn_q_norm": ("self_attn.q_norm", "D"),
        "attn_k_norm": ("self_attn.k_norm", "D"),
        "ffn_norm": ("post_attention_layernorm", "H"),
        "ffn_gate": ("mlp.gate_proj", "FH"),
        "ffn_up": ("mlp.up_proj", "FH"),
        "ffn_down": ("mlp.down_proj", "HF"),
    }
)
_HEAD_NORMS = ("attn_q_norm.weight", "attn_k_norm.weight")
_WEIGHTS = frozenset(f"{stem}.weight" for stem in _LAYER).difference(_HEAD_NORMS)
_QKV_BIAS = frozenset(("attn_q.bias", "attn_k.bias", "attn_v.bias"))
_ATTENTION_BIAS = ("attention_bias", _QKV_BIAS | {"attn_output.bias"})
_MLP_BIAS = ("mlp_bias", frozenset(("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")))


@dataclass(frozen=True, slots=True)
class _Family:
    """An architecture: the tensors that each layer has, and those that come and go with a flag of the config."""

    model_class: str
    always: frozenset[str]
    flags: tuple[tuple[str, frozenset[str]], ...] = ()
    interleaved: bool = False


_FAMILIES = MappingProxyType(
    {
        "llama": _Family("LlamaForCausalLM", _WEIGHTS, (_ATTENTION_BIAS, _MLP_BIAS), interleaved=True),
        "qwen2": _Family("Qwen2ForCausalLM", _WEIGHTS | _QKV_BIAS),
        "qwen3": _Family("Qwen3ForCausalLM", _WEIGHTS.union(_HEAD_NORMS), (_ATTENTION_BIAS,)),
    }
)
_USED = (
    "vocab_size block_count context_length embedding_length feed_forward_length rope.dimension_count rope.freq_base"
    " attention.head_count attention.head_count_kv attention.key_length attention.value_length"
    " attention.layer_norm_rms_epsilon rope.scaling.type rope.scaling.finetuned"
)
_IN_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_.]+)")
_PLAIN = ("F32", "F16", "BF16")


def read_gguf(path: str) -> Checkpoint:
    """The GGUF file at `path` as a checkpoint, from its header; what could not be carried over is in the notes."""
    header = read_header(path)
    architecture = header.get("general.architecture", str)
    if header.get("split.count", int, 1) > 1:
        raise header.error("KB212", "one part of a split GGUF file", "join the parts with `llama-gguf-split --merge`")
    if architecture not in _FAMILIES:
        hint = f"{nearest(str(architecture), _FAMILIES)}; or {OTHER_FILES}"
        raise header.error("KB215", f"the architecture {architecture!r} is unknown", hint)
    family = _FAMILIES[architecture]
    _check_types(header)
    flags = _check_names(header, family, header.size(f"{architecture}.block_count"))
    sizes = _sizes(header, architecture)
    found = [_entry(header, name, sizes, family) for name in header.tensors if name != _ROPE_FREQS]
    scaling, rope_notes = _rope_scaling(header, architecture, sizes)
    companions, notes = _companions(header)
    return Checkpoint(
        where=path,
        kind="gguf",
        entries=MappingProxyType({entry.name: entry for entry in found}),
        files=(header.file,),
        companions=companions,
        config=MappingProxyType(_config(header, architecture, sizes, found) | scaling | flags),
        notes=(*rope_notes, *notes),
    )


def derived_companion(path: str, name: str) -> bytes:
    """The bytes of the companion file `name` that the GGUF file at `path` stands for."""
    if name not in (CONFIG, GENERATION_CONFIG):
        files = gguf_tokenizer.tokenizer_files(path, (name,))
        if name not in files:
            known = (CONFIG, GENERATION_CONFIG, *gguf_tokenizer.FILES)
            raise SourceError("KB219", f"no {name} can be made from it", at=path, hint=nearest(name, known))
        return files[name]
    if name == CONFIG:
        return json_bytes(dict(read_gguf(path).config or {}))
    header = read_header(path)
    ids = {f"{role}_token_id": number for role, number in gguf_tokenizer.token_ids(header).items() if role != "unk"}
    turns = [header.get(f"tokenizer.ggml.{end}_token_id", int) for end in ("eot", "eom")]
    ends = list(dict.fromkeys(end for end in (ids.get("eos_token_id"), *turns) if end is not None))
    return json_bytes({**ids, "eos_token_id": ends} if len(ends) > 1 else ids)


def decode_rows(entry: Entry, read: Callable[[int, int], Any], start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop) of a tensor, all but its last dimension being rows; BF16 comes as its bits in uint16.

    `read(offset, nbytes)` gives bytes of the file. How a tensor is cut into rows does not change a bit of them.
    """
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    kind = GGMLQuantizationType[entry.spec.dtype.value if entry.encoding == RAW else entry.encoding[5:]]
    block, size = GGML_QUANT_SIZES[kind]
    *leading, columns = entry.spec.shape
    rows = math.prod(leading)
    if not 0 <= start <= stop <= rows:
        raise ValueError(f"rows {start} to {stop} of {rows}")
    if entry.heads and not leading:
        order = _stored_rows(numpy.arange(columns), columns // entry.heads)
        return numpy.take(decode_rows(replace(entry, heads=0), read, start, stop), order, axis=1)
    if start == stop:
        return numpy.empty((0, columns), _numpy_dtype(entry))
    wanted = numpy.arange(start, stop)
    if entry.heads:
        wanted = _stored_rows(wanted, rows // entry.heads)
    first, row_bytes = int(wanted.min()), columns // block * size
    nbytes = (int(wanted.max()) + 1 - first) * row_bytes
    data = read(entry.offset + first * row_bytes, nbytes)
    if len(data) != nbytes:
        raise SourceError("KB214", f"{entry.name}: the file ends early", at=entry.file, hint="get the file again")
    stored = numpy.frombuffer(data, numpy.uint8).reshape(-1, row_bytes)
    stored = stored[wanted - first] if entry.heads else stored
    return _decoded(stored, kind, _numpy_dtype(entry)).reshape(stop - start, columns)


def _stored_rows(rows: NDArray[Any], head: int) -> NDArray[Any]:
    """Where rows of heads of `head` rows are stored: each head's halves are interleaved, row by row."""
    within = rows % head
    stored: NDArray[Any] = rows - within + within % (head // 2) * 2 + within // (head // 2)
    return stored


def _numpy_dtype(entry: Entry) -> str:
    return {DType.F16: "<f2", DType.BF16: "<u2"}.get(entry.spec.dtype, "<f4")


def _decoded(stored: NDArray[Any], kind: GGMLQuantizationType, dtype: str) -> NDArray[Any]:
    """A new array with the values of whole blocks."""
    import numpy
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    if kind.name in _PLAIN:
        return numpy.array(stored.reshape(-1).view(dtype))
    block, size = GGML_QUANT_SIZES[kind]
    blocks = stored.reshape(-1, size)
    values: NDArray[Any] = numpy.empty(len(blocks) * block, dtype)
    step = max(1, _PIECE // block)
    with numpy.errstate(all="ignore"):  # a scale may be infinite or NaN: then so are the values
        for at in range(0, len(blocks), step):
            piece = dequantize(blocks[at : at + step].reshape(1, -1), kind)
            values[at * block : (at + step) * block] = piece.reshape(-1)
    return values


def _check_names(header: Header, family: _Family, layers: int) -> dict[str, bool]:
    """Raise an error for tensors that are unknown or missing; else the flags of the config that the others set."""
    optional = frozenset[str]().union(*(members for _, members in family.flags))
    outer = {f"{stem}.weight" for stem in _OUTER}
    found: dict[int, set[str]] = {number: set() for number in range(min(layers, len(header.tensors)))}
    unknown = []
    for name in header.tensors:
        match = _IN_LAYER.fullmatch(name)
        if match and int(match[1]) in found and match[2] in family.always | optional:
            found[int(match[1])].add(match[2])
        elif name not in outer and not (name == _ROPE_FREQS and family.interleaved):
            unknown.append(name)
    if unknown:
        raise header.error("KB216", f"{family.model_class} has no tensors for {_some(unknown)}", OTHER_FILES)
    every = set[str]().union(*found.values())
    flags = {flag: bool(members & every) for flag, members in family.flags}
    always = family.always.union(*(members for flag, members in family.flags if flags[flag]))
    missing = [f"blk.{number}.{suffix}" for number, there in found.items() for suffix in sorted(always - there)]
    missing += sorted(outer - {"output.weight"} - set(header.tensors))
    if missing:
        raise header.error("KB216", f"tensors are missing: {_some(missing)}")
    return flags


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _sizes(header: Header, architecture: str) -> dict[str, int]:
    """The sides that shapes are checked by, and the numbers of heads."""
    hidden = header.size(f"{architecture}.embedding_length")
    heads = header.size(f"{architecture}.attention.head_count")
    groups = header.size(f"{architecture}.attention.head_count_kv", heads)
    head = header.size(f"{architecture}.attention.key_length", max(1, hidden // heads))
    if head % 2 or heads % groups:
        what = f"{heads} heads of {head} rows over {groups} key heads are no attention"
        raise header.error("KB218", what, OTHER_FILES)
    sizes = {"V": header.tensors["token_embd.weight"].shape[0], "H": hidden, "D": head, "heads": heads}
    sizes |= {"F": header.size(f"{architecture}.feed_forward_length"), "Q": heads * head, "K": groups * head}
    return {**sizes, "groups": groups}


def _entry(header: Header, name: str, sizes: Mapping[str, int], family: _Family) -> Entry:
    stored, (stem, _, kind) = header.tensors[name], name.rpartition(".")
    match = _IN_LAYER.fullmatch(stem)
    own, sides = _LAYER[match[2]] if match else _OUTER[stem]
    shape = tuple(sizes[side] for side in (sides if kind == "weight" else sides[0]))
    if stored.shape != shape:
        raise header.error("KB216", f"{name} has the shape {list(stored.shape)}, not {list(shape)}")
    heads = 0
    if family.interleaved and match and match[2] in ("attn_q", "attn_k"):
        heads = sizes["heads" if match[2] == "attn_q" else "groups"]
    plain = stored.type in _PLAIN
    spec = TensorSpec(DType(stored.type) if plain else DType.F32, shape)
    encoding = RAW if plain and not heads else f"gguf:{stored.type}"
    hf_name = f"model.layers.{match[1]}.{own}.{kind}" if match else f"{own}.{kind}"
    return Entry(hf_name, spec, header.path, stored.offset, stored.nbytes, encoding, heads)


def _check_types(header: Header) -> None:
    """Raise an error for a type that the gguf library has no decoder for."""
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for kind in sorted({stored.type for stored in header.tensors.values()}.difference(_PLAIN)):
        number = GGMLQuantizationType[kind]
        try:
            dequantize(numpy.zeros((1, GGML_QUANT_SIZES[number][1]), numpy.uint8), number)
        except NotImplementedError:
            name = next(name for name, stored in header.tensors.items() if stored.type == kind)
            raise header.error("KB217", f"{name}: the type {kind} cannot be decoded", OTHER_FILES) from None


def _config(header: Header, architecture: str, sizes: Mapping[str, int], entries: list[Entry]) -> dict[str, Any]:
    matrices = {entry.spec.dtype for entry in entries if len(entry.spec.shape) > 1}
    roles = gguf_tokenizer.token_ids(header)
    return {
        "architectures": [_FAMILIES[architecture].model_class],
        "model_type": architecture,
        "vocab_size": sizes["V"],
        "hidden_size": sizes["H"],
        "intermediate_size": sizes["F"],
        "num_hidden_layers": header.size(f"{architecture}.block_count"),
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["groups"],
        "head_dim": sizes["D"],
        "hidden_act": "silu",
        "max_position_embeddings": header.size(f"{architecture}.context_length"),
        "rms_norm_eps": header.real(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": header.real(f"{architecture}.rope.freq_base", _ROPE_THETA),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        **{f"{role}_token_id": roles.get(role) for role in ("bos", "eos", "pad")},
        "dtype": (matrices.pop() if len(matrices) == 1 else DType.F32).torch_name,
    }


def _rope_scaling(header: Header, architecture: str, sizes: Mapping[str, int]) -> tuple[dict[str, Any], list[str]]:
    """The `rope_scaling` of the config, and notes on what the file says that the config has no word for."""
    base, used, notes = f"{architecture}.rope.scaling", set(_USED.split()), []
    kind, scaling = header.get(f"{base}.type", str, "none"), {}
    if kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": header.real(f"{base}.factor")}
        used.add("rope.scaling.factor")
    elif kind != "none":
        used.remove("rope.scaling.type")
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = header.size(f"{base}.original_context_length")
        used.add("rope.scaling.original_context_length")
    if _ROPE_FREQS in header.tensors:
        llama3 = _llama3_scaling(header, header.real(f"{architecture}.rope.freq_base", _ROPE_THETA), sizes["D"])
        if scaling or not llama3:
            notes.append(f"{_ROPE_FREQS} is not carried over: config.json has no word for its factors")
        scaling = scaling or llama3
    if header.size(f"{architecture}.rope.dimension_count", sizes["D"]) != sizes["D"]:
        used.remove("rope.dimension_count")
    for key, value in header.metadata.items():
        prefix, _, rest = key.partition(".")
        if prefix == architecture and rest not in used:
            notes.append(f"{key} is not carried over: {value!r:.60}")
    return ({"rope_scaling": scaling} if scaling else {}), notes


def _llama3_scaling(header: Header, theta: float, head: int) -> dict[str, Any]:
    """The `llama3` rule behind the factors of `rope_freqs.weight`; empty if it gives others."""
    stored, low, high, context = header.tensors[_ROPE_FREQS], 1.0, 4.0, 8192
    if (stored.type, stored.shape) != ("F32", (head // 2,)):
        return {}
    try:
        with open(header.path, "rb") as file:
            file.seek(stored.offset)
            factors = struct.unpack(f"<{head // 2}f", file.read(stored.nbytes))
    except (OSError, struct.error) as error:
        raise header.error("KB201", f"cannot be read: {error}") from None
    factor = factors[-1]
    if not 1 <= factor < math.inf:
        return {}
    for number, found in enumerate(factors):
        turns = context / (2 * math.pi * theta ** (2 * number / head))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        if not math.isclose(found, 1 / ((1 - smooth) / factor + smooth), rel_tol=1e-4):
            return {}
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _companions(header: Header) -> tuple[tuple[Companion, ...], list[str]]:
    names, notes = [CONFIG, GENERATION_CONFIG], []
    try:
        gguf_tokenizer.check_tokenizer(header)
    except SourceError as error:
        notes.append(f"no tokenizer comes with it: {error.message}; {error.hint}")
    else:
        names += [gguf_tokenizer.TOKENIZER, gguf_tokenizer.TOKENIZER_CONFIG]
        names += [gguf_tokenizer.CHAT_TEMPLATE] * ("tokenizer.chat_template" in header.metadata)
    notes += [f"{key} is not carried over" for key in header.metadata if key.startswith("tokenizer.chat_template.")]
    return tuple(Companion(name, header.path, derived=True) for name in names), notes
