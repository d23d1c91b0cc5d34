"""A published merge: its tensors, and the recipe inside it, in the numerics of what made it. It only reads.

The recipe is that of kittybuild.json, else of the peers' configuration beside the weights, else the one in the README.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.folder import INDEX
from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.source import Entry
from kittybuild.checkpoint.sources.hub import open_pinned, pin_repository
from kittybuild.checkpoint.sources.web import Web
from kittybuild.errors import SourceError, UsageError, VerifyError, nearest
from kittybuild.model.lock import REPOSITORY, Pin
from kittybuild.model.recipe import Recipe
from kittybuild.planner.published import CONFIGS, published_class
from kittybuild.planner.targets import targets
from kittybuild.publish.folder import PROVENANCE
from kittybuild.publish.provenance import README, Provenance, read_provenance
from kittybuild.recipe.parse import parse_recipe

LIKELY = "mergekit-0.1.5"
"""The class of a merge of mergekit's that does not say its version: one file of weights has no index."""
_BLOCK = re.compile(r"^```ya?ml[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MERGE = re.compile(r"^(merge_method|slices|models|modules|kittybuild)\s*:", re.MULTILINE)


@dataclass(frozen=True)
class Published:
    """`where` it is, as it was asked for; `found_in`: the file that the recipe is from; `said`: its kittybuild.json."""

    where: str
    tensors: Mapping[str, Entry]
    recipe: Recipe
    stage: str
    found_in: str
    said: Provenance | None
    notes: tuple[str, ...] = ()

    @property
    def lock(self) -> dict[str, Pin]:
        """What its sources on the Hub were."""
        pins = self.said.lock.get("sources", {}) if self.said else {}
        try:
            return {name: _pin(pin) for name, pin in pins.items() if "commit" in pin}
        except (ValueError, AttributeError) as error:
            raise VerifyError("KB602", f"the lock in {PROVENANCE} is damaged: {error}", at=self.where) from error


def open_published(where: str, builders: Builders, numerics: str | None = None, offline: bool = False) -> Published:
    """The merge in a folder, or in a repository on the Hub, which is downloaded. `numerics`: in place of what it says.

    Raises UsageError, SourceError, RecipeError or VerifyError.
    """
    if numerics and numerics not in builders.classes():
        raise UsageError("KB006", f"there are no numerics {numerics!r}", hint=nearest(numerics, builders.classes()))
    folder = where if os.path.isdir(where) else _downloaded(where, offline)
    recipe, found_in, said, notes = _recipe(folder, builders, numerics)
    wanted = [said.stage] if said else list(targets(recipe, ()))
    if len(wanted) != 1 or wanted[0] not in recipe.stages:
        message = f"its recipe has no one stage that would be this folder ({', '.join(wanted)})"
        raise VerifyError("KB602", message, at=os.path.join(where, found_in), hint="build it from its recipe file")
    recipe = replace(recipe, outputs={})  # how it was cut into shards is no matter
    return Published(where, open_source(folder).entries, recipe, wanted[0], found_in, said, notes)


def _downloaded(where: str, offline: bool) -> str:
    """The folder of a repository's files, all that matter here, verified against the Hub's word for them."""
    name, _, revision = where.partition("@")
    if not REPOSITORY.fullmatch(name):
        hint = "give an output folder, or ORGANISATION/NAME of the Hub"
        raise SourceError("KB201", f"no such folder: {where}", hint=hint)
    web = Web(offline=offline)
    checkpoint, cached = open_pinned(
        pin_repository({"hub": name, **({"revision": revision} if revision else {})}, web), web
    )
    weights = {file for entry in checkpoint.entries.values() for file in entry.files}
    needed = [os.path.relpath(path, cached.view).replace(os.sep, "/") for path in sorted(weights)]
    for file in (*needed, PROVENANCE, *CONFIGS, README, INDEX):
        if file in cached.files:
            cached.bring_whole(file)
    return cached.view


def _recipe(
    folder: str, builders: Builders, numerics: str | None
) -> tuple[Recipe, str, Provenance | None, tuple[str, ...]]:
    """The recipe, the file that it is from, what kittybuild says of the folder, and notes."""
    catalogue = builders.catalogue()
    if os.path.isfile(os.path.join(folder, PROVENANCE)):
        said = read_provenance(folder)
        file = os.path.join(folder, PROVENANCE)
        return parse_recipe(said.text, file, catalogue, numerics or said.numerics), PROVENANCE, said, ()
    name, text = _text(folder)
    note = None
    if numerics is None:
        config = name if name in CONFIGS else CONFIGS[0]
        numerics, note = published_class(os.path.join(folder, config), builders.classes())
        if numerics is None:
            told = note or f"{folder}: nothing says which version of mergekit made it"
            numerics, note = LIKELY, f"{told.split(': --numerics')[0]}; {LIKELY} is taken, --numerics chooses another"
    recipe = parse_recipe(text, os.path.join(folder, name), catalogue, numerics)
    return recipe, name, None, (note,) if note else ()


def _text(folder: str) -> tuple[str, str]:
    """The name and the text of the peers' configuration, or of the first recipe in the README."""
    for name in (*CONFIGS, README):
        try:
            with open(os.path.join(folder, name), encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError:
            continue
        if name != README:
            return name, text
        for block in _BLOCK.findall(text):
            if _MERGE.search(block):
                return name, block
    hint = f"it needs a {PROVENANCE}, a {CONFIGS[0]}, or a README.md with the configuration as a yaml block"
    raise VerifyError("KB605", "there is no recipe in it", at=folder, hint=hint)


def _pin(value: Mapping[str, object]) -> Pin:
    known = {key: item for key, item in value.items() if key not in ("content", "read", "quantized")}
    return Pin.from_json(known)
