"""What two texts of a recipe say otherwise, key by key, with the place in the newer one. Neither need be a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from kittybuild.errors import RecipeError
from kittybuild.model.recipe import At
from kittybuild.recipe.yamltext import Document, Path, read_documents


@dataclass(frozen=True, slots=True)
class TextChange:
    """One key or entry. `stage`: whose declaration it is in, None where it is in none or in the only one.

    `was` and `now` are plain values as a person reads them, None for what is not there.
    """

    path: str
    was: str | None
    now: str | None
    at: At
    stage: str | None
    top: str

    @property
    def of_parameters(self) -> bool:
        """Whether it is about parameters of models or merges."""
        return "parameters" in self.path.replace("[", ".").split(".")


def text_changes(before: str, after: str, file: str) -> tuple[TextChange, ...]:
    """What is otherwise in `after`, in the order of the text; nothing where one of them cannot be read."""
    try:
        old, new = read_documents(before, file), read_documents(after, file)
    except RecipeError:
        return ()
    found: list[TextChange] = []
    for index, document in enumerate(new):
        was = old[index].value if index < len(old) else None
        found += _changes(was, document.value, (), document)
    return tuple(found)


def _changes(was: Any, now: Any, path: Path, document: Document) -> Iterator[TextChange]:
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys((*now, *was)):
            if key not in was or key not in now:
                yield _change(was.get(key), now.get(key), (*path, key), document)
            else:
                yield from _changes(was[key], now[key], (*path, key), document)
    elif isinstance(was, list) and isinstance(now, list):
        yield from _entries(was, now, path, document)
    elif was != now or type(was) is not type(now):
        yield _change(was, now, path, document)


def _entries(was: list[Any], now: list[Any], path: Path, document: Document) -> Iterator[TextChange]:
    """Entries that stand at one place are compared; where some came or went, those that stayed are found first."""
    if len(was) == len(now):
        for index, pair in enumerate(zip(was, now, strict=True)):
            yield from _changes(*pair, (*path, index), document)
        return
    texts = [_text(entry) for entry in was], [_text(entry) for entry in now]
    for kind, i, j, k, m in SequenceMatcher(a=texts[0], b=texts[1], autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        both = min(j - i, m - k)
        for index in range(both):
            yield from _changes(was[i + index], now[k + index], (*path, k + index), document)
        for entry in was[i + both : j]:
            yield _change(entry, None, (*path, k + both), document)
        for index in range(k + both, m):
            yield _change(None, now[index], (*path, index), document)


def _change(was: Any, now: Any, path: Path, document: Document) -> TextChange:
    own = isinstance(document.value, Mapping) and "kittybuild" in document.value
    stage = str(path[1]) if own and len(path) > 1 and path[0] == "stages" else None
    shown = path[2:] if stage else path
    at = document.at(path) if now is not None else document.key_at(path[:-1])
    return TextChange(_dotted(shown), _shown(was), _shown(now), at, stage, str(path[0]) if own and path else "")


def _dotted(path: Path) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _shown(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else _text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
