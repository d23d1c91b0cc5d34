"""YAML as plain values, with the place of every key and value. Nothing in it is executed.

Only plain data comes out: no tags, no aliases that contain themselves, no key twice, and at most MOST_NODES nodes.
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
Path = tuple[str | int, ...]

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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


def _syntax_error(error: yaml.YAMLError, file: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None)
    at = str(At(file, mark.line + 1, mark.column + 1)) if mark else file
    problem = getattr(error, "problem", None) or str(error)
    return RecipeError("KB101", f"not valid YAML: {problem}", at=at, hint="check indentation, quotes and colons here")


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
        self.count += 1
        if self.count > MOST_NODES:
            raise self.fail(node, f"more than {MOST_NODES} values", "aliases multiply: write fewer of them")
        if id(node) in self.open:
            raise self.fail(node, "an alias that contains itself", "write the value out")
        self.values[path] = self.place(node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.open.add(id(node))
        try:
            return self.mapping(node, path) if isinstance(node, yaml.MappingNode) else self.sequence(node, path)
        finally:
            self.open.discard(id(node))

    def scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            value = self.loader.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            raise self.fail(node, f"cannot read {node.value!r}: {error}", "put it in quotes") from error
        return value if value is None or isinstance(value, (bool, int, float, str)) else node.value

    def sequence(self, node: yaml.Node, path: Path) -> list[Any]:
        return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]

    def mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        merged = sum(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value)
        if len(own) < len(node.value) - max(0, merged - 1):
            self.complain_of_duplicates(node)
        self.loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key that is not plain text", "keys are words")
            here = (*path, key.value)
            self.keys[here] = self.place(key)
            result[key.value] = self.read(item, here)
        return result

    def complain_of_duplicates(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise self.fail(key, f"the key {key.value!r} stands here twice", "keep one of them")
            seen.add(str(key.value))
