"""The key of a whole stage, from its text and the identity of its sources: no header is read for it.

Equal keys mean equal manifests. The key may be wrong only on the safe side: a new key for what gives the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kittybuild import __version__
from kittybuild.builders.base import Builders
from kittybuild.digest import Digest, tagged
from kittybuild.model.recipe import AdapterUse, ApplyLoraStage, MergeStage, ModelRef, MoeStage, Recipe, Stage, to_json
from kittybuild.planner.machine import Machine, by_machine
from kittybuild.planner.tables import gathers, tables_stage


def stage_keys(
    recipe: Recipe,
    wanted: Sequence[str],
    fingerprints: Mapping[str, Digest],
    builders: Builders,
    machine: Machine | None = None,
) -> dict[str, Digest]:
    """The keys of all stages that the wanted ones need, in the order of building.

    `machine`: where they are to be built, if a class of arithmetic depends on that.
    """
    versions = {f"{b.numerics}/{b.name}": b.version for b in builders.by_class.values()}
    keys = _Keys(recipe, fingerprints, builders, versions, machine)
    for name in wanted:
        keys.stage(recipe.stages[name])
    # What an intermediate stage lists depends on what is asked of it.
    asked = [[name, keys.done[name].hex, _shard_size(recipe, name)] for name in wanted]
    return {name: tagged("kittybuild.stage.v1", [key.hex, asked]) for name, key in keys.done.items()}


def _shard_size(recipe: Recipe, name: str) -> int | None:
    return recipe.outputs[name].shard_size if name in recipe.outputs else None


class _Keys:
    def __init__(
        self,
        recipe: Recipe,
        fingerprints: Mapping[str, Digest],
        builders: Builders,
        versions: Mapping[str, int | str],
        machine: Machine | None,
    ) -> None:
        self.recipe, self.fingerprints, self.machine = recipe, fingerprints, machine
        self.builders, self.versions = builders, versions
        self.done: dict[str, Digest] = {}

    def stage(self, stage: Stage) -> Digest:
        """The key of a stage over the identities of what it names."""
        if stage.name not in self.done:
            named = {str(ref): self.model(ref).hex for ref in stage.references()}
            form = {
                "tool": __version__,
                "versions": self.versions,
                "seed": self.recipe.seed,
                "machine": self._machine(stage),
                "stage": to_json(replace(stage, name="")),
                "models": named,
            }
            key = self.done[stage.name] = tagged("kittybuild.stage-content.v1", form)
            for ref in stage.references() if isinstance(stage, MergeStage) and gathers(stage) else ():
                self.done[tables_stage(stage.name, ref)] = tagged("kittybuild.tables.v1", [key.hex, str(ref)])
        return self.done[stage.name]

    def _machine(self, stage: Stage) -> str | None:
        """What of the machine the bits of a stage depend on."""
        if self.machine is None or not by_machine(stage, self.builders):
            return None
        return self.machine.text(numpy=True, transformers=isinstance(stage, MoeStage))

    def model(self, ref: ModelRef) -> Digest:
        """The identity of what a reference names."""
        if ref.adapter:
            adapter = ModelRef(ref.adapter, ref.adapter_revision)
            use = (AdapterUse(adapter),)
            return self.stage(ApplyLoraStage(str(ref), ModelRef(ref.model, ref.revision), use))
        if ref.model in self.recipe.stages and ref.revision is None:
            return self.stage(self.recipe.stages[ref.model])
        return self.fingerprints[ref.base_text]
