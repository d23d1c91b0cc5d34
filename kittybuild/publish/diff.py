"""Two checkpoints held against each other: tensors, config, tokenizer, other files; and of outputs of ours, why.

It only reads. Neither side need be an output of ours, and neither is believed: what a kittybuild.json says is only used
to say why tensors differ that were found to differ.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kittybuild.checkpoint.folder import is_companion
from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.reading import read_companion
from kittybuild.checkpoint.safetensors_file import read_safetensors
from kittybuild.checkpoint.source import Entry
from kittybuild.errors import BuildError, SourceError, VerifyError
from kittybuild.model.made import Derivations, first_cause
from kittybuild.model.manifest import Manifest
from kittybuild.publish.compare import (
    CLOSE,
    DIFFERENT,
    IDENTICAL,
    OTHER_DTYPE,
    OTHER_SHAPE,
    Compared,
    compare_all,
    only,
)
from kittybuild.publish.provenance import has_provenance, read_provenance
from kittybuild.recipe.changes import TextChange, text_changes
from kittybuild.store.store import Store
from kittybuild.tokens.chat import read_template
from kittybuild.tokens.compare import Difference, compare
from kittybuild.tokens.config import rows_in
from kittybuild.tokens.reading import TABLES, read_vocabulary

NAMES = ("a", "b")
OTHER = "other"
_KINDS = (IDENTICAL, CLOSE, DIFFERENT, *map(only, NAMES), OTHER_DTYPE, OTHER_SHAPE)
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_ANY_ROWS = 1 << 40


@dataclass(frozen=True)
class Told:
    """What is told of a build: the stage, the text of its recipe, its lock, and what made each tensor."""

    stage: str
    text: str
    lock: Mapping[str, Any]
    derivations: Derivations


@dataclass(frozen=True)
class Side:
    """One checkpoint: tensors, small files by name, config, and what is told of how it was built."""

    where: str
    entries: Mapping[str, Entry]
    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    said: Told | None = None
    notes: tuple[str, ...] = ()


def open_side(where: str) -> Side:
    """A folder or a file of weights. Raises SourceError; a kittybuild.json that cannot be read is a note."""
    found = open_source(where)
    said, notes = None, found.notes
    try:
        if has_provenance(where):
            found_said = read_provenance(where)
            said = Told(found_said.stage, found_said.text, found_said.lock, found_said.derivations)
    except VerifyError as error:
        notes = (*notes, str(error))
    files = {companion.name: read_companion(companion) for companion in found.companions}
    tensors = {entry.name: entry for entry in found.entries.values()}
    return Side(where, tensors, files, found.config or {}, said, notes)


def kept_side(where: str, manifest: Manifest, said: Told, store: Store) -> Side:
    """What a stage made, as the store keeps it. Raises BuildError KB506 for what it has lost."""
    files = {}
    for file in manifest.files:
        data = store.read_file(file.digest)
        if data is None:
            raise BuildError("KB506", f"the store has lost the companion file {file.name}", hint="build again")
        if is_companion(file.name):
            files[file.name] = data
    config = json.loads(files.get("config.json", b"{}"))
    return Side(where, kept_entries(manifest, store), files, config, said)


def kept_entries(manifest: Manifest, store: Store) -> dict[str, Entry]:
    """Where the store keeps the tensors of an output. Raises BuildError KB506."""
    found: dict[str, Entry] = {}
    for shard in manifest.shards:
        path = store.pack(shard.pack)
        if path is None:
            raise BuildError("KB506", f"the store has lost the pack {shard.pack}", hint="build again")
        found |= read_safetensors(path)
    return {tensor.name: found[tensor.name] for tensor in manifest.tensors}


@dataclass(frozen=True)
class OtherFile:
    """A small file that the sides do not have alike. `how`: `other`, or which side alone has it. `keys`: of JSON, what
    is otherwise: (key, there, here), as JSON."""

    name: str
    how: str
    keys: tuple[tuple[str, str | None, str | None], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `diff --json` prints it."""
        keys = [{"key": key, "a": there, "b": here} for key, there, here in self.keys]
        return {"name": self.name, "how": self.how, "keys": keys}


@dataclass(frozen=True)
class Diff:
    """How `b` differs from `a`. `tokens`: None where it is the same, or not known. `recipe`: what its text says
    otherwise; `cause`: the first reason for a tensor that differs, as far as known."""

    tensors: tuple[Compared, ...]
    files: tuple[OtherFile, ...]
    tokens: Difference | None
    template: bool
    recipe: tuple[TextChange, ...]
    cause: str | None
    notes: tuple[str, ...]

    def apart(self, within: int | None = None) -> tuple[Compared, ...]:
        """The tensors that are not the same. `within`: so many units in the last place are the same."""
        return tuple(one for one in self.tensors if not one.within(within))

    def to_json(self) -> dict[str, Any]:
        """As `diff --json` prints it."""
        counts = Counter(one.how for one in self.tensors)
        tokens = self.tokens
        return {
            "tensors": {kind.replace(" ", "_"): counts[kind] for kind in _KINDS},
            "patterns": [pattern.to_json() for pattern in patterns(self.tensors) if pattern.apart],
            "differences": [one.to_json() for one in self.tensors if one.how != IDENTICAL],
            "files": [file.to_json() for file in self.files],
            "tokens": tokens and {"only_a": len(tokens.lost), "only_b": len(tokens.more), "moved": len(tokens.moved)},
            "chat_template": "other" if self.template else "same",
            "recipe": [{"what": c.path, "a": c.was, "b": c.now, "at": str(c.at)} for c in self.recipe],
            "cause": self.cause,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Pattern:
    """The tensors of one place in all layers. `worst`: of those that differ."""

    name: str
    tensors: tuple[Compared, ...]

    @property
    def apart(self) -> tuple[Compared, ...]:
        """Those that differ."""
        return tuple(one for one in self.tensors if one.how != IDENTICAL)

    def to_json(self) -> dict[str, Any]:
        """As `diff --json` prints it: the largest differences, and the smallest cosine."""
        measures = [one.measures for one in self.apart if one.measures]
        largest = {
            name: max((v for m in measures if (v := getattr(m, name)) is not None), default=None)
            for name in ("max_abs", "relative")
        }
        cosine = min((m.cosine for m in measures if m.cosine is not None), default=None)
        ulps = max((one.ulps for one in self.apart if one.ulps is not None), default=None)
        form = {"pattern": self.name, "tensors": len(self.tensors), "apart": len(self.apart)}
        return {**form, "how": sorted({one.how for one in self.apart}), **largest, "cosine": cosine, "ulps": ulps}


def patterns(tensors: Sequence[Compared]) -> tuple[Pattern, ...]:
    """The tensors by their names without the numbers of layers, in their order."""
    found: dict[str, list[Compared]] = {}
    for one in tensors:
        found.setdefault(_NUMBER.sub("*", one.name), []).append(one)
    return tuple(Pattern(name, tuple(ones)) for name, ones in found.items())


def diff(one: Side, two: Side, *, memory: int, jobs: int) -> Diff:
    """How the second differs from the first. Raises SourceError. `memory`: bytes for the blocks of all `jobs`."""
    tensors = compare_all(one.entries, two.entries, NAMES, memory=memory, jobs=jobs)
    notes = [f"{side.where}: {note}" for side in (one, two) for note in side.notes]
    apart = [each for each in tensors if each.how != IDENTICAL]
    tokens = None
    try:
        first, second = (
            read_vocabulary(side.files, rows_in(side.config) or _ANY_ROWS, side.where) for side in (one, two)
        )
        tokens = compare(first, second) if first and second else None
        template = len({read_template(side.files, side.where) for side in (one, two)}) > 1
    except SourceError as error:
        notes.append(str(error))
        template = False
    recipe = text_changes(one.said.text, two.said.text, two.where) if one.said and two.said else ()
    cause = _cause(one.said, two.said, apart[0]) if one.said and two.said and apart else None
    files = tuple(_files(one.files, two.files))
    return Diff(tensors, files, tokens or None, template, recipe, cause, tuple(notes))


def _cause(one: Told, two: Told, first: Compared) -> str:
    """Why the first tensor that differs does, as both outputs tell it."""
    sources = _sources(two)
    for name, pin in _sources(one).items():
        other = sources.get(name, {})
        if other and pin.get("read") == other.get("read") and pin.get("content") != other.get("content"):
            return f"the source {name} holds other tensors"
    stages = one.stage, two.stage
    made = [said.derivations.get(said.stage, {}).get(first.name) for said in (one, two)]
    if not any(made):
        return f"{first.name} is taken over from another place, or a side has it not"
    found = first_cause(one.derivations, two.derivations, stages, first.name)
    return found or f"{first.name}: one derivation, and other bits: one of them was changed after it was built"


def _sources(told: Told) -> dict[str, dict[str, Any]]:
    """The pins of a lock, which may be a stranger's."""
    found = told.lock.get("sources") if isinstance(told.lock, dict) else None
    return {name: pin for name, pin in found.items() if isinstance(pin, dict)} if isinstance(found, dict) else {}


def _files(one: Mapping[str, bytes], two: Mapping[str, bytes]) -> Iterator[OtherFile]:
    for name in sorted({*one, *two}):
        if name not in one or name not in two:
            yield OtherFile(name, only(NAMES[name not in one]))
        elif one[name] != two[name]:
            large = name in TABLES
            keys = () if large else tuple(_keys(_object(one[name]), _object(two[name])))
            yield OtherFile(name, OTHER, keys)


def _object(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _keys(one: Any, two: Any, path: str = "") -> Iterator[tuple[str, str | None, str | None]]:
    if isinstance(one, dict) and isinstance(two, dict):
        for key in dict.fromkeys((*one, *two)):
            here = f"{path}.{key}" if path else key
            if key not in one or key not in two:
                there, now = (json.dumps(side[key], ensure_ascii=False) if key in side else None for side in (one, two))
                yield here, there, now
            else:
                yield from _keys(one[key], two[key], here)
    elif one != two and path:
        yield path, json.dumps(one, ensure_ascii=False), json.dumps(two, ensure_ascii=False)
