"""GGUF files as sources: Hugging Face names, shapes, rows and config over the bytes that llama.cpp stores.

Every tensor of a file is an entry, or in its config, or in a note; one that is unknown is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kittybuild.checkpoint import gguf_tokenizer
from kittybuild.checkpoint.gguf_config import config_of
from kittybuild.checkpoint.gguf_families import IN_LAYER, Family, Names, family_of, sizes_of
from kittybuild.checkpoint.gguf_header import OTHER_FILES, Header, read_header, read_parts
from kittybuild.checkpoint.gguf_tokenizer import json_bytes
from kittybuild.checkpoint.quantized import quantized_note
from kittybuild.checkpoint.source import RAW, Checkpoint, Companion, Entry
from kittybuild.errors import SourceError, nearest
from kittybuild.tensors import DType, TensorSpec

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType
    from numpy.typing import NDArray

    from kittybuild.checkpoint.decoding import Read

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

_PIECE = 1 << 16  # elements decoded at a time: the temporaries stay in cache
_PLAIN = ("F32", "F16", "BF16")


def read_gguf(path: str) -> Checkpoint:
    """The GGUF file at `path` as a checkpoint, from its header; what could not be carried over is in the notes.

    Of a split file, `path` is the first part. Raises SourceError KB201 and KB211 to KB218.
    """
    header = read_parts(path)
    family = family_of(header)
    architecture = header.get("general.architecture", str)
    _check_types(header)
    names = Names.of(family, architecture)
    flags = names.check(header, family, header.size(f"{architecture}.block_count"))
    sizes = sizes_of(header, family)
    tensors = [name for name in header.tensors if name not in family.beside]
    found = [entry for name in tensors for entry in _entries(header, name, sizes, family, names)]
    matrices = {entry.spec.dtype for entry in found if len(entry.spec.shape) > 1}
    dtype = matrices.pop() if len(matrices) == 1 else DType.F32
    config, config_notes = config_of(header, family, sizes, dtype, flags)
    companions, notes = _companions(header)
    return Checkpoint(
        where=path,
        kind="gguf",
        entries=MappingProxyType({entry.name: entry for entry in found}),
        files=header.files,
        companions=companions,
        config=MappingProxyType(config),
        notes=(*config_notes, *notes, *quantized_note(found)),
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


def decode_rows(entry: Entry, read: Read, start: int, stop: int) -> NDArray[Any]:
    """Rows [start, stop) of a tensor, all but its last dimension being rows; BF16 comes as its bits in uint16.

    How a tensor is cut into rows does not change a bit of them.
    """
    import numpy
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    _, name, shift = (*entry.encoding.split(":"), "", "")[:3]
    kind = GGMLQuantizationType[name or entry.spec.dtype.value]
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
    data = read(entry.file, entry.offset + first * row_bytes, nbytes)
    if len(data) != nbytes:
        raise SourceError("KB214", f"{entry.name}: the file ends early", at=entry.file, hint="get the file again")
    stored = numpy.frombuffer(data, numpy.uint8).reshape(-1, row_bytes)
    stored = stored[wanted - first] if entry.heads else stored
    values = _decoded(stored, kind, _numpy_dtype(entry)).reshape(stop - start, columns)
    if shift:
        values += numpy.float32(shift)
    return values


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


def _entries(header: Header, name: str, sizes: Mapping[str, int], family: Family, names: Names) -> Iterator[Entry]:
    """The tensor `name` under its Hugging Face name, or (experts) one for each of the stacked tensors."""
    stored, (stem, _, kind) = header.tensors[name], name.rpartition(".")
    match = IN_LAYER.fullmatch(stem)
    own, sides = names.layer[match[2]] if match else names.outer[stem]
    shape = tuple(sizes[side] for side in (sides if kind == "weight" else sides[0]))
    if stored.shape != shape and (sides[0] != "1" or stored.shape != shape[1:]):
        raise header.error("KB216", f"{name} has the shape {list(stored.shape)}, not {list(shape)}")
    shift = family.shift if own.endswith("norm") else 0
    if shift and stored.type != "F32":
        raise header.error("KB217", f"{name}: a norm of the type {stored.type}", OTHER_FILES)
    heads = 0
    if family.interleaved and own in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = sizes["heads" if own == "self_attn.q_proj" else "groups"]
    plain = stored.type in _PLAIN
    encoding = RAW if plain and not heads and not shift else f"gguf:{stored.type}"
    encoding += f":{-shift}" if shift else ""
    full = f"model.layers.{match[1]}.{own}.{kind}" if match else f"{own}.{kind}"
    if sides[0] != "N" or len(sides) < 3:
        spec = TensorSpec(DType(stored.type) if plain else DType.F32, shape)
        yield Entry(full, spec, stored.path, stored.offset, stored.nbytes, encoding, heads)
        return
    spec, nbytes = TensorSpec(DType(stored.type) if plain else DType.F32, shape[1:]), stored.nbytes // shape[0]
    for expert in range(shape[0]):
        expert_name = full.replace(".experts.", f".experts.{expert}.")
        yield Entry(expert_name, spec, stored.path, stored.offset + expert * nbytes, nbytes, encoding)


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
