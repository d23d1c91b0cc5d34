"""Models opened to be looked at: tensors read as they are asked for, models filled from them; no folder is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal

from kittybuild import api
from kittybuild.builders.base import Builders
from kittybuild.builders.floats import numpy_dtype
from kittybuild.builders.registry import BUILTIN
from kittybuild.calls import RecipeLike, default_store, read
from kittybuild.checkpoint.opening import open_source
from kittybuild.checkpoint.reading import Files, read_companion
from kittybuild.checkpoint.source import Entry
from kittybuild.errors import PlanError, SourceError, UsageError
from kittybuild.planner.towers import sliced
from kittybuild.planner.views import open_all
from kittybuild.recipe.programs import recipe_of
from kittybuild.store.store import Store
from kittybuild.tensors import TensorSpec

Framework = Literal["torch", "numpy"]


class OpenCheckpoint(Mapping[str, Any]):
    """The tensors of a checkpoint by name, each read when it is asked for; `close` it, or use it as a context manager.

    `specs`: dtype and shape of each, without reading it. `file(name)`: the bytes of a companion file, or None.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        file: Callable[[str], bytes | None],
        framework: Framework,
        held: ExitStack,
    ) -> None:
        self.file = file
        self.specs: Mapping[str, TensorSpec] = {name: entry.spec for name, entry in entries.items()}
        self._entries, self._framework, self._held = entries, framework, held
        self._files = held.enter_context(Files())

    def __getitem__(self, name: str) -> Any:
        entry = self._entries[name]
        data = bytearray(entry.spec.nbytes)
        self._files.reader(entry).read_into(0, memoryview(data))
        if self._framework == "torch":
            from kittybuild.executor.filled import as_torch

            return as_torch(data, entry.spec)
        import numpy as np

        return np.frombuffer(data, dtype=numpy_dtype(entry.spec.dtype)).reshape(entry.spec.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Let go of files and store; twice is fine."""
        self._held.close()

    def __enter__(self) -> OpenCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    where: RecipeLike, stage: str | None = None, *, framework: Framework = "torch", store: str | None = None
) -> OpenCheckpoint:
    """A folder or file of weights; or, with `stage`, that stage of a recipe, straight from the store.

    What the store lacks is built first, without a folder. Tensors keep their dtype: in numpy, bfloat16 and float8 are
    those of ml_dtypes. Raises a KittybuildError.
    """
    if stage is not None:
        return _open_stage(where, stage, framework, store or default_store())
    if isinstance(where, Mapping):
        raise UsageError("KB001", "which stage of the recipe?", hint="name it: open_checkpoint(recipe, STAGE)")
    checkpoint = open_source(os.fspath(where))
    companions = {companion.name: companion for companion in checkpoint.companions}

    def file(name: str) -> bytes | None:
        return read_companion(companions[name]) if name in companions else None

    return OpenCheckpoint({entry.name: entry for entry in checkpoint.entries.values()}, file, framework, ExitStack())


def _open_stage(recipe: RecipeLike, stage: str, framework: Framework, folder: str) -> OpenCheckpoint:
    prepared = replace(api.prepare(read(recipe), (stage,)), folders={})
    with ExitStack() as held:
        store = held.enter_context(Store.open(folder))  # while it is open, nothing in it is deleted
        manifest = store.manifest(api.build(prepared, store).stages[stage].manifest)
        assert manifest is not None  # it was just built
        entries: dict[str, Entry] = {}
        for shard in manifest.shards:
            path = store.pack(shard.pack)
            assert path is not None
            entries |= {entry.name: entry for entry in open_source(path).entries.values()}
        digests = {each.name: each.digest for each in manifest.files}
        ordered = {tensor.name: entries[tensor.name] for tensor in manifest.tensors}
        return OpenCheckpoint(
            ordered,
            lambda name: store.read_file(digests[name]) if name in digests else None,
            framework,
            held.pop_all(),
        )


def load_model(where: RecipeLike, stage: str | None = None, *, store: str | None = None) -> Any:
    """The transformers model of a folder or of a stage, filled in memory, in evaluation mode. No folder is written.

    Raises SourceError KB206 without a config.json, else as `open_checkpoint`; UsageError KB019, VerifyError KB601.
    """
    from kittybuild.executor.filled import filled_model

    told = stage if stage is not None else str(where)
    with open_checkpoint(where, stage, store=store) as tensors:
        config, generation = tensors.file("config.json"), tensors.file("generation_config.json")
        if config is None:
            raise SourceError("KB206", "there is no config.json", at=told, hint="open its tensors: `open_checkpoint`")
        made = filled_model(tensors, json.loads(config), json.loads(generation) if generation else None, told)
    return made


def layer_counts(
    models: Sequence[str], file: str, builders: Builders = BUILTIN, *, offline: bool = False
) -> dict[str, int]:
    """How many layers models have, from their headers. Relative paths count from the folder of `file`.

    Raises SourceError, or PlanError KB304 for a model without layers, or with several stacks of them.
    """
    uses = [{"model": model} for model in models]
    text = recipe_of({"all": {"merge_method": "linear", "models": uses, "parameters": {"weight": 1}}}, {})
    recipe = api.recipe_of(text, file, builders, offline=offline)
    prepared = api.prepare(recipe, ("all",), builders=builders, offline=offline)
    sources = open_all(prepared.paths, prepared.pins, prepared.web)
    counts = {}
    for model, use in zip(models, recipe.stages["all"].references(), strict=True):
        view = sources.view(use.base_text)
        found = sliced(view.tensors, view.config)
        if len(found) != 1:
            raise PlanError("KB304", f"{model} has no one stack of layers", hint="name models with one stack of layers")
        counts[model] = found[0].body
    return counts
