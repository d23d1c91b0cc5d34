"""Which stacks of layers a model has, and where its config.json counts each. Read from names, not from a table.

A tower is what a slice is cut from: layers that follow each other, with the places of their count in the config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.planner.names import LayerName, layer_of

KeyPath = tuple[str, ...]

EXTRA_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Counts of layers that stand behind the last of the stack and predict further tokens."""

_WORD = re.compile(r"[a-z]+")
_VISION = frozenset({"vision", "visual", "image", "video", "vit", "pixel", "sam", "siglip"})
_AUDIO = frozenset({"audio", "speech", "sound", "acoustic", "codec", "mimi"})
_BRIDGE = frozenset({"perceiver", "resampler", "connector", "projector", "qformer"})
_COUNTED = frozenset({"layer", "layers", "block", "blocks", "depth"})
_COUNTING = frozenset({"num", "n", "hidden", "encoder", "decoder", "transformer", *_COUNTED})


@dataclass(frozen=True, slots=True)
class Tower:
    """One stack of `count` layers (several side by side, where a model keeps the parts of a layer in lists of their
    own). `keys`: where the config counts them. `body`: as many as it counts; what follows predicts further tokens.
    `tensors`: how many tensors are in it."""

    stacks: tuple[str, ...]
    count: int
    body: int
    keys: tuple[KeyPath, ...]
    tensors: int

    def layer(self, name: str) -> LayerName | None:
        """The layer of this tower that a tensor belongs to."""
        found = layer_of(name)
        return found if found and found.stack in self.stacks else None

    @property
    def label(self) -> str:
        """Its name for people."""
        return self.stacks[0]


def kind_of(text: str) -> str:
    """What a part of a model is for, as the words of its name tell: a bridge between two, vision, audio, or text."""
    words = set(_WORD.findall(text.lower()))
    kinds = {"bridge": _BRIDGE, "vision": _VISION, "audio": _AUDIO}
    return next((kind for kind, known in kinds.items() if words & known), "text")


def side_of(text: str) -> str | None:
    """Whether a name says encoder or decoder; the outermost word counts."""
    return next((word for word in _WORD.findall(text.lower()) if word in ("encoder", "decoder")), None)


def towers(names: Iterable[str], config: Mapping[str, Any] | None) -> tuple[Tower, ...]:
    """All stacks of a model. Stacks of one length side by side are one tower."""
    indices: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        if layer := layer_of(name):
            indices.setdefault(layer.stack, set()).add(layer.index)
            sizes[layer.stack] = sizes.get(layer.stack, 0) + 1
    groups: dict[tuple[str, int], list[str]] = {}
    for stack, found in indices.items():  # at the top, stacks side by side are parts of their own
        groups.setdefault((stack.rpartition(".")[0] or stack, max(found) + 1), []).append(stack)
    counts = list(counts_in(config or {}))
    made = []
    for (_, count), group in groups.items():
        body, keys = _counted(group[0], count, counts)
        made.append(Tower(tuple(group), count, body, keys, sum(sizes[stack] for stack in group)))
    return tuple(made)


def sliced(names: Iterable[str], config: Mapping[str, Any] | None) -> tuple[Tower, ...]:
    """The tower that slices are cut from: the one that the config counts, of the text, with the most layers.

    Several where nothing decides between them, as between encoder and decoder; none where there are no layers.
    """
    found = towers(names, config)
    found = tuple(tower for tower in found if kind_of(tower.label) == "text") or found
    found = tuple(tower for tower in found if tower.keys) or found
    if {"encoder", "decoder"} <= {side_of(tower.label) for tower in found}:
        return found
    most = max(((tower.count, tower.tensors) for tower in found), default=None)
    return tuple(tower for tower in found if (tower.count, tower.tensors) == most)


def is_count(key: str) -> bool:
    """Whether a key of a config is a number of layers: `num_hidden_layers`, `n_layer`, `decoder_layers`, `depth`."""
    words = key.lower().split("_")
    return key in ("depth", "layers") or (len(words) > 1 and words[-1] in _COUNTED and set(words) <= _COUNTING)


def counts_in(config: Mapping[str, Any], above: KeyPath = ()) -> Iterator[tuple[KeyPath, int, int]]:
    """Every number of layers in a config: where it stands, the number, and how many more follow that it leaves out."""
    extra = sum(value for key in EXTRA_LAYERS if type(value := config.get(key)) is int)
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from counts_in(value, (*above, key))
        elif type(value) is int and value > 0 and is_count(key):
            yield (*above, key), value, extra


def _counted(stack: str, count: int, counts: list[tuple[KeyPath, int, int]]) -> tuple[int, tuple[KeyPath, ...]]:
    """How many layers of a stack the config counts, and where."""
    fitting = [
        (path, number)
        for path, number, extra in counts
        if number in (count, count - extra) and kind_of(" ".join(path[:-1])) == kind_of(stack)
    ]
    side = side_of(stack)
    if side:  # a key without a side counts the encoder, where there are both: T5's and BART's do
        own = [place for place in fitting if _side(place[0]) == side]
        plain = [place for place in fitting if _side(place[0]) is None]
        fitting = own if own and side == "decoder" else own + plain
    elif any(_side(path) is None for path, _ in fitting):
        fitting = [place for place in fitting if _side(place[0]) is None]
    body = fitting[0][1] if fitting else count
    return body, tuple(path for path, number in fitting if number == body)


def _side(path: KeyPath) -> str | None:
    return side_of(" ".join(path).replace("_", " "))
