"""YAML as plain values, with the place of every key and value. Nothing in it is executed.

Only plain data comes out: no tags, no aliases that contain themselves, no key twice, at most MOST_NODES nodes, and at
most DEEPEST of them inside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from kittybuild.errors import RecipeError
from kittybuild.model.recipe import At

MOST_NODES = 200_000
DEEPEST = 100
Path = tuple[str | int, ...]

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE = "tag:yaml.org,2002:merge"
_PLAIN = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


@dataclass(frozen=True)
class Document:
    """One YAML document: its value, and where each part of it stands."""

    value: Any
    file: str
    values: Mapping[Path, At]
    keys: Mapping[Path, At]

    def at(self, path: Path) -> At:
        """The place of the value at `path`, or of the nearest value around it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.values:
                return self.values[path[:end]]
        return At(self.file, 1, 1)

    def key_at(self, path: Path) -> At:
        """The place of the key that leads to `path`."""
        return self.keys.get(path) or self.at(path)


def read_documents(text: str, file: str) -> tuple[Document, ...]:
    """The documents of a YAML text; empty ones are left out. Raises RecipeError KB101."""
    try:
        _check_depth(text, file)
        loader = _Loader(text)
        try:
            found = []
            while loader.check_node():
                found.append(_Reader(loader, file).document(loader.get_node()))
            return tuple(document for document in found if document.value is not None)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _syntax_error(error, file) from error
    except RecursionError as error:
        raise RecipeError("KB101", "the YAML is nested too deeply", at=file) from error


def _check_depth(text: str, file: str) -> None:
    """Refuse deep nesting: libyaml composes nodes recursively, and the process would die of it."""
    depth = 0
    event: Any
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            at = At(file, event.start_mark.line + 1, event.start_mark.column + 1)
            raise RecipeError("KB101", f"more than {DEEPEST} values inside each other", at=str(at))


def _syntax_error(error: yaml.YAMLError, file: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    at = str(At(file, mark.line + 1, mark.column + 1)) if mark else file
    if isinstance(error, yaml.reader.ReaderError):
        problem, hint = f"it holds the control character {chr(error.character)!r}", "take it out"
    else:
        problem, hint = _problem(error), "check indentation, quotes and colons here"
    return RecipeError("KB101", f"not valid YAML: {problem}", at=at, hint=hint)


def _problem(error: Exception) -> str:
    """What is wrong, without the places that PyYAML puts into its texts."""
    return getattr(error, "problem", None) or str(error)


class _Reader:
    """Turns nodes into values, noting positions on the way."""

    def __init__(self, loader: Any, file: str) -> None:
        self.loader, self.file = loader, file
        self.values: dict[Path, At] = {}
        self.keys: dict[Path, At] = {}
        self.open: set[int] = set()
        self.count = 0

    def document(self, node: Any) -> Document:
        value = self.read(node, ())
        return Document(value, self.file, MappingProxyType(self.values), MappingProxyType(self.keys))

    def place(self, node: yaml.Node) -> At:
        return At(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def fail(self, node: yaml.Node, message: str, hint: str) -> RecipeError:
        return RecipeError("KB101", message, at=str(self.place(node)), hint=hint)

    def read(self, node: yaml.Node, path: Path) -> Any:
        self.count_one(node)
        self.values[path] = self.place(node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.enter(node)
        try:
            return self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        finally:
            self.open.discard(id(node))

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fail(node, f"cannot read {_short(node.value)}: {_problem(error)}", "put it in quotes") from error
        return value if value is None or isinstance(value, (bool, int, float, str)) else node.value

    def sequence(self, node: yaml.Node, path: Path) -> list[Any]:
        self.check_tag(node)
        return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, item in self.pairs(node).values():
            here = (*path, key.value)
            self.keys[here] = self.place(key)
            result[key.value] = self.read(item, here)
        return result

    def pairs(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.ScalarNode, yaml.Node]]:
        """The keys and values of a mapping by the keys' text; its own go before those that it takes over with `<<`."""
        self.check_tag(node)
        own: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        taken: dict[str, tuple[yaml.ScalarNode, yaml.Node]] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key that is not plain text", "keys are words")
            if key.tag == _MERGE:
                for mapping in item.value if isinstance(item, yaml.SequenceNode) else [item]:
                    taken = {**self.taken(mapping), **taken}
            elif key.value in own:
                raise self.fail(key, f"the key {_short(key.value)} stands here twice", "keep one of them")
            else:
                own[key.value] = (key, item)
        return {**taken, **own}

    def taken(self, node: yaml.Node) -> dict[str, tuple[yaml.ScalarNode, yaml.Node]]:
        """What `<<` takes over from a mapping."""
        self.count_one(node)
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, "`<<` takes a mapping or a list of mappings", "write `<<: *NAME`")
        self.enter(node)
        try:
            return self.pairs(node)
        finally:
            self.open.discard(id(node))

    def count_one(self, node: yaml.Node) -> None:
        self.count += 1
        if self.count > MOST_NODES:
            raise self.fail(node, f"more than {MOST_NODES} values", "aliases multiply: write fewer of them")

    def enter(self, node: yaml.Node) -> None:
        if id(node) in self.open:
            raise self.fail(node, "an alias that contains itself", "write the value out")
        if len(self.open) >= DEEPEST:
            raise self.fail(node, f"more than {DEEPEST} values inside each other", "write it flatter")
        self.open.add(id(node))

    def check_tag(self, node: yaml.Node) -> None:
        if node.tag not in _PLAIN:
            raise self.fail(node, f"the tag {_short(node.tag)} has no meaning here", "take it out")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
