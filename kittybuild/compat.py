"""mergekit's `run_merge`, with its arguments: a program that calls it needs another import, and no other change."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

import yaml

from kittybuild import api
from kittybuild.calls import default_store
from kittybuild.recipe.peer_options import NOTES
from kittybuild.recipe.programs import Settings, merge_text, peer_size
from kittybuild.store.store import Store

_MEANT = frozenset({"random_seed", "out_shard_size", "unsafe_truncate_embeddings", "num_threads"})
_SHOWN = frozenset({"quiet", "verbosity"})
"""Options of what is shown: here nothing is."""


class Dumps(Protocol):
    """A pydantic model, as mergekit's MergeConfiguration and MergeOptions are."""

    def model_dump(self, *, mode: str = ..., exclude_none: bool = ...) -> dict[str, Any]:
        """Its fields as plain data."""


def run_merge(
    merge_config: Mapping[str, Any] | Dumps,
    out_path: str,
    options: Mapping[str, Any] | Dumps | None = None,
    config_source: str | None = None,
    *,
    store: str | None = None,
    **more: Any,
) -> api.BuildReport:
    """Merge as a mergekit configuration says, into `out_path`; what was made before is not made again.

    `options` and keyword arguments are fields of mergekit's MergeOptions: those that change nothing here are noted in
    the report. `config_source` is taken and not needed: the output says what it was made of. Raises a KittybuildError,
    TypeError for an option that mergekit does not have either.
    """
    config = _plain(merge_config)
    given = {**(_plain(options) if options is not None else {}), **more}
    words = {option.partition("/")[0].partition(" ")[0]: note for option, note in NOTES.items()}
    notes = []
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if name not in _MEANT | _SHOWN and option not in words:
            raise TypeError(f"run_merge has no option {name!r}")
        if option in words and name in more:
            notes.append(f"{name}: {words[option]}")
    size = given.get("out_shard_size")
    settings = Settings(
        given.get("random_seed"),
        peer_size(size) if isinstance(size, str) else size,
        bool(given.get("unsafe_truncate_embeddings")),
    )
    text = yaml.safe_dump(config, sort_keys=False)
    folder = os.path.abspath(out_path)
    lowered = merge_text(text, config, folder, settings)
    recipe = api.recipe_of(lowered, f"{os.path.basename(folder)}.recipe")
    prepared = api.prepare(recipe, (), folder)
    with Store.open(store or default_store()) as opened:
        report = api.build(prepared, opened, jobs=given.get("num_threads") or 1)
    return replace(report, notes=(*notes, *report.notes))


def _plain(value: Mapping[str, Any] | Dumps) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else value.model_dump(mode="json", exclude_none=True)
