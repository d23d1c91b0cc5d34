"""The state dict in what a torch file holds: tensors by name, and notes on all else. Every tensor is named or noted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from kittybuild.errors import SourceError

DEEPEST = 16
LONGEST_NAME = 1024
MOST_VALUES = 200_000

# What training keeps beside a model, in the words of torch's own examples, Lightning, fairseq and the Trainer.
_TRAINING = re.compile(r"(?:.*_)?(?:optim(?:izer)?|(?:lr_)?scheduler|(?:grad_)?scaler|rng|loop|callback)s?(?:_.*)?")
_UNNAMED = "\0"
_SAVE = "save the state dict alone, as safetensors"

T = TypeVar("T")
Path = tuple[str, ...]


def state_dict(where: str, value: Any, kind: type[T]) -> tuple[dict[str, T], tuple[str, ...]]:
    """The values of type `kind` in nested dicts and lists by name, and notes. Raises SourceError KB224.

    An only dict that holds them is taken for the state dict itself (`{"state_dict": {...}}`), and what training keeps
    beside it is left out; of several dicts all are taken, and names are joined with dots.
    """
    if not isinstance(value, dict):
        raise _unnamed(where, "it holds no dict of tensors")
    tensors, others = _leaves(where, value, kind)
    notes = []
    while tensors and all(len(path) > 1 for path in tensors):
        heads = _heads(tensors)
        models = [head for head in heads if not _TRAINING.fullmatch(head.lower())] or heads
        if training := [head for head in heads if head not in models]:
            notes.append(f"not read, since training kept it beside the model: {some(training)}")
            tensors = {path: tensor for path, tensor in tensors.items() if path[0] in models}
            others = [path for path in others if path[0] not in training]
        if len(models) > 1:
            notes.append(f"its dicts are one, with names joined by dots: {some(models)}")
            break
        notes += _not_tensors(path for path in others if path[0] != models[0])
        notes.append(f"its tensors are those of its entry {models[0]!r}")
        tensors = {path[1:]: tensor for path, tensor in tensors.items()}
        others = [path[1:] for path in others if path[0] == models[0] and len(path) > 1]
    notes += _not_tensors(others, _heads(tensors))
    return _named(where, tensors), tuple(notes)


def some(names: Iterable[str]) -> str:
    """The first names of many, and how many more there are."""
    known = list(names)
    more = f" and {len(known) - 3} more" if len(known) > 3 else ""
    return ", ".join(repr(name) for name in known[:3]) + more


def _heads(paths: Iterable[Path]) -> list[str]:
    return list(dict.fromkeys(path[0] for path in paths))


def _not_tensors(paths: Iterable[Path], heads: Iterable[str] = ()) -> list[str]:
    """A note on values that are no tensors: by their whole path where tensors lie beside them, else by its head."""
    names = dict.fromkeys(".".join(path) if path[0] in heads else path[0] for path in paths)
    return [f"not read, since it is no tensor: {some(names)}"] if names else []


def _leaves(where: str, value: Mapping[Any, Any], kind: type[T]) -> tuple[dict[Path, T], list[Path]]:
    """Every tensor by its path, and the paths of everything else, in order."""
    tensors: dict[Path, T] = {}
    others: list[Path] = []
    left = MOST_VALUES
    todo: list[tuple[Path, Any]] = [((), value)]
    while todo:
        path, found = todo.pop()
        if isinstance(found, kind):
            if path in tensors or _UNNAMED in path:
                raise _unnamed(where, "a tensor of it has another's name, or a key that is no name")
            tensors[path] = found
        elif isinstance(found, (dict, list, tuple)) and found:
            left -= len(found)
            if left < 0 or len(path) == DEEPEST:
                what = f"nests dicts deeper than {DEEPEST}" if left >= 0 else f"holds more than {MOST_VALUES} values"
                raise _unnamed(where, f"it {what}")
            items = found.items() if isinstance(found, dict) else enumerate(found)
            todo += [((*path, _name(where, key)), item) for key, item in items][::-1]
        elif path:
            others.append(path)
    return tensors, others


def _name(where: str, key: Any) -> str:
    if not isinstance(key, (str, int)):
        return _UNNAMED
    name = str(key)
    try:
        fits = len(name.encode("utf-8")) <= LONGEST_NAME
    except UnicodeEncodeError:
        fits = False
    if not fits or _UNNAMED in name:
        raise _unnamed(where, f"a name in it is no text of at most {LONGEST_NAME} bytes: {name[:40]!r}")
    return name


def _named(where: str, tensors: Mapping[Path, T]) -> dict[str, T]:
    named: dict[str, T] = {}
    for path, tensor in tensors.items():
        name = ".".join(path)
        if name in named or len(name.encode("utf-8")) > LONGEST_NAME:
            why = "is the name of two of its tensors" if name in named else "is too long a name"
            raise _unnamed(where, f"{name[:200]!r} {why}")
        named[name] = tensor
    return named


def _unnamed(where: str, message: str) -> SourceError:
    return SourceError("KB224", message, at=where, hint=_SAVE)
