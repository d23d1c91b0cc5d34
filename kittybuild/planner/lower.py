"""The whole recipe lowered to a Plan. The headers of all sources are given; of files, only small ones are read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError, PlanError, raise_all
from kittybuild.model.derivation import Derivation, Input, StageTensor, Step
from kittybuild.model.plan import ADAPTER_CONFIG, Plan, StagePlan, inputs_of
from kittybuild.model.recipe import (
    AdapterUse,
    ApplyLoraStage,
    ExtractLoraStage,
    MergeAdaptersStage,
    MergeStage,
    ModelRef,
    MoeStage,
    Recipe,
    Stage,
    TransplantStage,
)
from kittybuild.planner.config import with_dtype
from kittybuild.planner.decomposed import Decomposed, Spectra
from kittybuild.planner.files import GENERATION, TOKENIZER_FILES, ModelFiles
from kittybuild.planner.fitting import ignored_notes
from kittybuild.planner.lower_adapters import AdaptersLowering
from kittybuild.planner.lower_extract import ExtractLowering
from kittybuild.planner.lower_lora import Applied, LoraLowering
from kittybuild.planner.lower_merge import MergeLowering
from kittybuild.planner.lower_moe import MoeLowering
from kittybuild.planner.lower_transplant import TransplantLowering
from kittybuild.planner.machine import Machine
from kittybuild.planner.merge_params import Origin
from kittybuild.planner.modules import ModulesLowering
from kittybuild.planner.views import Sources, View
from kittybuild.planner.vocabulary import Aligned, aligned, without_tables
from kittybuild.tensors import DType
from kittybuild.tokens.reading import FILES

DEFAULT_SHARD = 1_000_000_000


def lower(
    recipe: Recipe,
    wanted: Sequence[str],
    sources: Sources,
    builders: Builders,
    machine: Machine | None = None,
    spectra: Spectra = MappingProxyType({}),
) -> Plan:
    """Every tensor that the wanted stages need, as steps. Raises all problems of all stages at once.

    `machine`: where it is to be built, if a stage's class of arithmetic depends on that. `spectra`: those that are
    known; where ranks hang on others, the largest are taken, and the plan is `open`.
    """
    lowering = _Lowering(recipe, sources, builders, machine, spectra)
    lowering.all_of(wanted)
    reports = [lowering.spectra_of[name] for name in wanted if name in lowering.spectra_of]
    sizes = {name: output.shard_size for name, output in recipe.outputs.items()}
    stages = _narrowed(lowering.done, (*wanted, *reports), sizes)
    notes = tuple(f"{c.where}: {note}" for c in sources.checkpoints.values() for note in c.notes)
    return Plan(stages, (*recipe.notes, *lowering.notes, *notes), tuple(lowering.open))


def only(plan: Plan, wanted: Sequence[str]) -> Plan:
    """What of a plan these stages need."""
    return replace(plan, stages=_narrowed(plan.stages, wanted, {}))


def _narrowed(done: Mapping[str, StagePlan], wanted: Sequence[str], sizes: Mapping[str, int]) -> dict[str, StagePlan]:
    """The wanted stages whole, in shards of these sizes; of the others what they need."""
    kept = _reached(done, wanted)
    stages = {}
    for name, stage in done.items():
        if name in wanted:
            shards = (tuple(stage.steps),) if stage.adapter else shards_of(stage.steps, sizes.get(name, DEFAULT_SHARD))
            stages[name] = replace(stage, shards=shards)
        elif kept[name]:
            steps = {n: step for n, step in stage.steps.items() if n in kept[name]}
            stages[name] = replace(stage, steps=steps, shards=())
    return stages


def origins(
    recipe: Recipe, wanted: Sequence[str], sources: Sources, builders: Builders, machine: Machine | None
) -> dict[str, Callable[[str], tuple[Origin, ...]]]:
    """For each stage that merges: the parameters of its tensors, with the places in the recipe that they came from."""
    lowering = _Lowering(recipe, sources, builders, machine)
    lowering.all_of(wanted)
    return {name: merge.origins for name, merge in lowering.merges.items()}


def shards_of(steps: Mapping[str, Step], shard_size: int) -> tuple[tuple[str, ...], ...]:
    """The names of each shard, in order; a shard is closed before it would pass `shard_size` bytes of tensors."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, step in steps.items():
        if shards[-1] and size + step.spec.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += step.spec.nbytes
    return tuple(tuple(shard) for shard in shards)


def _reached(stages: Mapping[str, StagePlan], wanted: Sequence[str]) -> dict[str, set[str]]:
    """The tensors of each stage that the wanted ones need."""
    reached: dict[str, set[str]] = {name: set() for name in stages}
    todo: list[Input] = []
    for name in wanted:
        todo += [given for step in stages[name].steps.values() for given in inputs_of(step)]
    while todo:
        given = todo.pop()
        if isinstance(given, StageTensor) and given.name not in reached[given.stage]:
            reached[given.stage].add(given.name)
            todo += inputs_of(stages[given.stage].steps[given.name])
    return reached


class _Lowering:
    """The stages lowered so far. A stage is lowered when the first reference asks for it."""

    def __init__(
        self,
        recipe: Recipe,
        sources: Sources,
        builders: Builders,
        machine: Machine | None,
        spectra: Spectra = MappingProxyType({}),
    ) -> None:
        self.recipe, self.sources, self.builders, self.machine = recipe, sources, builders, machine
        self.spectra = spectra
        self.spectra_of: dict[str, str] = {}
        self.open: list[str] = []
        self.problems: list[KittybuildError] = []
        self.done: dict[str, StagePlan] = {}
        self.merges: dict[str, MergeLowering | ModulesLowering] = {}
        self.views: dict[str, View] = {}
        self.broken: set[str] = set()
        self.notes: list[str] = []
        self.files = ModelFiles(sources)

    def all_of(self, wanted: Sequence[str]) -> None:
        """Lower these stages and what they need. Raises all problems at once."""
        for name in wanted:
            self.stage(name)
        raise_all(self.problems)

    def stage(self, name: str) -> View:
        """The model that a stage makes."""
        if name not in self.views:
            self._lower(self.recipe.stages[name])
        return self.views[name]

    def view(self, ref: ModelRef) -> View:
        """The model that a reference names; an adapter on it is a stage of its own."""
        key = str(ref)
        if ref.adapter and key not in self.views:
            base = ModelRef(ref.model, ref.revision, at=ref.at)
            adapter = ModelRef(ref.adapter, ref.adapter_revision, at=ref.at)
            self._lower(ApplyLoraStage(key, base, (AdapterUse(adapter, 1.0, ref.at),), at=ref.at))
        elif key not in self.views:
            found = self._named(ref)
            if not found.adapter:
                return found
            hint = f"name its base with it: BASE+{ref}"
            self.problems.append(PlanError("KB307", f"{ref} is an adapter, not a model", at=str(ref.at), hint=hint))
            self.broken.add(key)
            self.views[key] = View(key, {}, None, None)
        return self.views[key]

    def _named(self, ref: ModelRef) -> View:
        """What a reference without an adapter names: a stage or a source, a model or an adapter."""
        if ref.model in self.recipe.stages and ref.revision is None:
            return self.stage(ref.model)
        return self.sources.view(ref.base_text)

    def adapter(self, use: AdapterUse) -> Applied:
        """The adapter that a stage names. Raises PlanError KB307 for a model, SourceError for one we cannot apply."""
        name = use.adapter.base_text
        found = self._named(use.adapter)
        where = None
        if name in self.sources.checkpoints:
            where = self.sources.checkpoints[name].where
        if not found.adapter:
            what = f"there is no {ADAPTER_CONFIG} in {where}" if where else "this stage makes a model"
            hint = "give the adapter's own folder, as peft saves it"
            raise PlanError("KB307", f"{name} is not an adapter: {what}", at=str(use.adapter.at), hint=hint)
        return Applied.of(found, use.weight, where)

    def _lower(self, stage: Stage) -> None:
        uses = stage.adapters if isinstance(stage, (ApplyLoraStage, MergeAdaptersStage)) else ()
        adapters = [use.adapter for use in uses]
        for ref in stage.references():
            if ref in adapters:
                self._named(ref)
            else:
                self.view(ref)
        if self.broken & {str(ref) for ref in stage.references()}:  # what follows from it is no news
            self._break(stage)
            return
        before = len(self.problems)
        if isinstance(stage, MergeStage):
            models = self._aligned(stage)
            lowering = ModulesLowering if stage.modules else MergeLowering
            merge = lowering(
                stage, models.view, self.builders, self.problems, self.recipe.seed, self.machine, self.derive
            )
            self.merges[stage.name] = merge
            steps, donor, files = merge.steps(), merge.donor, models.files
            config = merge.config() if len(self.problems) == before else None
            self.notes += [*ignored_notes(stage.at, merge.ignored), *merge.notes, *models.notes]
        elif isinstance(stage, TransplantStage):
            self._transplant(stage)
            return
        elif isinstance(stage, MoeStage):
            donor = self.view(stage.base)
            files = donor.files
            steps, config = self._moe(stage, donor)
        elif isinstance(stage, ExtractLoraStage):
            self._extract(stage)
            return
        elif isinstance(stage, MergeAdaptersStage):
            self._merge_adapters(stage)
            return
        else:
            donor = self.view(stage.base)
            files = donor.files
            steps = LoraLowering(stage, donor, self._adapters(stage), self.builders, self.problems).steps()
            config = donor.config
        if len(self.problems) > before:
            self._break(stage)
            return
        self._finish(stage, donor, steps, config, files)

    def _transplant(self, stage: TransplantStage) -> None:
        before = len(self.problems)
        views = self.view(stage.model), self.view(stage.donor)
        try:
            model, donor = (self.files.of(view, (*TOKENIZER_FILES, GENERATION)) for view in views)
            transplant = TransplantLowering(
                stage, views, (model, donor), self.builders, self.problems, self.recipe.seed, self.machine
            )
            steps = transplant.steps()
        except KittybuildError as error:
            self.problems.append(error)
        if len(self.problems) > before:
            self._break(stage)
            return
        files = {**views[0].files, **transplant.companions()}
        self._finish(stage, views[0], steps, transplant.config(), files)

    def _finish(
        self,
        stage: Stage,
        donor: View,
        steps: dict[str, Step],
        config: Mapping[str, object] | None,
        files: Mapping[str, bytes | None],
    ) -> None:
        """Note the plan of a stage, and the model that it makes."""
        config = config and _dtype_fixed(config, donor, steps)
        plan = StagePlan(stage.name, stage.kind, steps, donor.donor, config, keep=stage.keep, allow_nan=stage.allow_nan)
        merge = self.merges.get(stage.name)
        self.done[stage.name] = replace(plan, files=files, ignored=merge.ignored if merge else {})
        tensors = {name: self._input(stage.name, name, step) for name, step in steps.items()}
        self.views[stage.name] = View(stage.name, tensors, donor.donor, config, files=files)

    def _aligned(self, stage: MergeStage) -> Aligned:
        """The models of a merge, with one vocabulary; as they are, where that cannot be had (noted)."""
        try:
            models = aligned(stage, self.view, self.files, self.builders)
        except KittybuildError as error:
            self.problems.append(error)
            return Aligned({ref: without_tables(self.view(ref)) for ref in stage.references()})
        self.done.update({tables.name: tables for tables in models.tables})
        return models

    def _adapters(self, stage: ApplyLoraStage | MergeAdaptersStage) -> list[Applied]:
        """The adapters of a stage; problems are noted."""
        found = []
        for use in stage.adapters:
            try:
                found.append(self.adapter(use))
            except KittybuildError as error:
                self.problems.append(error)
        return found

    def _extract(self, stage: ExtractLoraStage) -> None:
        views, before = (self.view(stage.model), self.view(stage.base)), len(self.problems)
        extraction = ExtractLowering(
            stage,
            views,
            self._base_name(stage.base),
            self.builders,
            self.problems,
            seed=self.recipe.seed,
            machine=self.machine,
            spectra=self.spectra.get(f"{stage.name}/spectra"),
        )
        steps = extraction.steps()
        if len(self.problems) > before:
            self._break(stage)
            return
        self.notes += extraction.notes
        self._decomposed(stage, extraction.cut)
        self._finish_adapter(stage, steps, extraction.config())

    def _merge_adapters(self, stage: MergeAdaptersStage) -> None:
        before = len(self.problems)
        adapters = self._adapters(stage)
        if len(self.problems) == before:
            spectra = self.spectra.get(f"{stage.name}/spectra")
            merge = AdaptersLowering(
                stage,
                adapters,
                self.builders,
                self.problems,
                seed=self.recipe.seed,
                machine=self.machine,
                spectra=spectra,
            )
            steps = merge.steps()
        if len(self.problems) > before:
            self._break(stage)
            return
        for name, made in merge.hidden.items():
            self.done[name] = StagePlan(name, "differences", made, None, None, keep=False, allow_nan=stage.allow_nan)
        if merge.cut:
            self._decomposed(stage, merge.cut)
        self._finish_adapter(stage, steps, merge.config())

    def _decomposed(self, stage: Stage, cut: Decomposed) -> None:
        """Note the decompositions of a stage, whose spectra other shapes may hang on."""
        for name, made in ((cut.factors_stage, cut.factors), (cut.spectra_stage, cut.spectra)):
            self.done[name] = StagePlan(name, "factors", made, None, None, allow_nan=stage.allow_nan)
        self.spectra_of[stage.name] = cut.spectra_stage
        if cut.how.rank.adaptive and cut.spectra_stage not in self.spectra:
            self.open.append(cut.spectra_stage)

    def _finish_adapter(self, stage: Stage, steps: Mapping[str, Step], config: Mapping[str, Any]) -> None:
        """Note the plan of a stage that makes an adapter, and that adapter."""
        files = {ADAPTER_CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
        self.done[stage.name] = StagePlan(
            stage.name, stage.kind, steps, None, None, keep=stage.keep, allow_nan=stage.allow_nan, files=files
        )
        tensors = {name: self._input(stage.name, name, step) for name, step in steps.items()}
        self.views[stage.name] = View(stage.name, tensors, None, config)

    def _base_name(self, ref: ModelRef) -> str:
        """What an adapter's config calls its base: as the recipe does."""
        known = self.recipe.sources.get(ref.model)
        return str(ref) if known is None or known.package else known.hub or known.path

    def derive(self, label: str, model: View, made: Mapping[str, Derivation]) -> Mapping[str, Input]:
        """Tensors that are made of a model's, in a stage of their own that nothing keeps."""
        if label not in self.done:
            self.done[label] = StagePlan(label, "layout", made, model.donor, model.config, keep=False)
        return {name: StageTensor(label, name, drv.spec) for name, drv in made.items()}

    def _moe(self, stage: MoeStage, base: View) -> tuple[dict[str, Step], Mapping[str, object] | None]:
        """The steps and the config of a mixture; what else its routers and experts need goes into stages before it."""
        before = len(self.problems)
        files = self._tokenizer(stage, base) if stage.prompted else {}
        moe = MoeLowering(stage, self.view, files, self.builders, self.problems, self.recipe.seed, self.machine)
        steps = moe.steps()
        self.notes += moe.notes
        if len(self.problems) > before:
            return {}, None
        for label, made, keep in moe.beside():
            self.done[label] = StagePlan(label, "moe", made, base.donor, base.config, (), keep, stage.allow_nan)
        return steps, moe.config()

    def _tokenizer(self, stage: MoeStage, base: View) -> dict[str, bytes]:
        """The files of a model's tokenizer."""
        try:
            return self.files.of(base, FILES)
        except KittybuildError as error:
            error.at = error.at or str(stage.at)
            self.problems.append(error)
            return {}

    def _break(self, stage: Stage) -> None:
        self.broken.add(stage.name)
        self.views[stage.name] = View(stage.name, {}, None, None)

    def _input(self, stage: str, name: str, step: Step) -> Input:
        return StageTensor(stage, name, step.spec) if isinstance(step, Derivation) else step


def _dtype_fixed(config: Mapping[str, object], donor: View, steps: Mapping[str, Step]) -> Mapping[str, object]:
    """`config` with the dtype that most bytes of the output have, where the stage changed it."""
    before, after = _main_dtype(donor.tensors.values()), _main_dtype(steps.values())
    return config if after is None or before == after else with_dtype(config, after)


def _main_dtype(steps: Iterable[Step]) -> DType | None:
    sizes: dict[DType, int] = {}
    for step in steps:
        if step.spec.dtype.is_float:
            sizes[step.spec.dtype] = sizes.get(step.spec.dtype, 0) + step.spec.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None
