"""The Python API: plan and build a recipe, as the commands do, without printing, exiting or reading the environment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.checkpoint.sources.lockfile import read_lock, write_lock
from kittybuild.checkpoint.sources.web import Web
from kittybuild.digest import Digest, Json, canonical, tagged
from kittybuild.errors import KittybuildError, RecipeError, UsageError, VerifyError, nearest, raise_all
from kittybuild.model.derivation import Derivation
from kittybuild.model.lock import Pin, differences, lock_json
from kittybuild.model.manifest import Manifest, ManifestTensor
from kittybuild.model.plan import Plan, StagePlan
from kittybuild.model.recipe import Recipe, SourceDecl
from kittybuild.planner.locking import locked, pinned_sources, pins, versions
from kittybuild.planner.machine import Machine, by_machine, this_machine
from kittybuild.planner.published import published_class
from kittybuild.planner.shortcut import stage_keys
from kittybuild.planner.targets import targets
from kittybuild.planner.views import Sources, fingerprints, locate, open_all, source_names
from kittybuild.recipe.parse import parse_partly
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.executor.events import Events
    from kittybuild.executor.run import StageResult
    from kittybuild.planner.decomposed import Spectra
    from kittybuild.planner.explain import Explanation
    from kittybuild.planner.known import Known
    from kittybuild.store.remote.keys import SigningKey

MEMORY = 4_000_000_000


@dataclass(frozen=True)
class StageReport:
    """What a build did for one stage."""

    tensors: int
    computed: int
    cached: int
    manifest: Digest
    nonfinite: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        """As `build --json` prints it."""
        counts: dict[str, Json] = {
            "tensors": self.tensors,
            "computed": self.computed,
            "cached": self.cached,
            "fetched": 0,
        }
        return {**counts, "manifest": self.manifest.hex, "nonfinite": dict(self.nonfinite)}


@dataclass(frozen=True)
class OutputReport:
    """What a build did for one output folder."""

    folder: str
    shards_written: int
    shards_linked: int

    def to_json(self) -> dict[str, Json]:
        """As `build --json` prints it."""
        return {"folder": self.folder, "shards_written": self.shards_written, "shards_linked": self.shards_linked}


@dataclass(frozen=True)
class BuildReport:
    """What a build did. Bytes are those of tensors; seconds are the wall's.

    `workers_peak`: the most bytes of memory that worker processes took, beside this one. `bytes_fetched`: those that
    came over the network after the headers.
    """

    stages: Mapping[str, StageReport]
    outputs: Mapping[str, OutputReport]
    bytes_read: int
    bytes_written: int
    workers_peak: int
    seconds: float
    notes: tuple[str, ...] = ()
    bytes_fetched: int = 0


@dataclass(frozen=True)
class Prepared:
    """A recipe with its sources found: all that can be said before a header is read.

    `paths`: the sources that lie here; `pins`: those on the Hub, which `web` leads to; `fresh`: those no lock had.
    """

    recipe: Recipe
    wanted: tuple[str, ...]
    folders: Mapping[str, str]
    decls: Mapping[str, SourceDecl]
    paths: Mapping[str, str]
    keys: Mapping[str, Digest]
    pins: Mapping[str, Pin] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    web: Web = field(default_factory=Web)
    machine: Machine | None = None


def read_recipe(file: str, builders: Builders = BUILTIN, numerics: str | None = None) -> Recipe:
    """The recipe in a file. Raises UsageError, RecipeError or Problems; with those of the text come those that the
    sources of its sound stages have.

    `numerics`: the class of arithmetic of stages that name none; left out, it is the recipe's, or for the recipe of a
    published merge the one that made it.
    """
    note = None
    if numerics is None:
        numerics, note = published_class(file, builders.classes())
    recipe = recipe_of(recipe_text(file), file, builders, numerics)
    return replace(recipe, notes=(note, *recipe.notes)) if note else recipe


def recipe_text(file: str) -> str:
    """The text of a recipe's file. Raises RecipeError KB100."""
    try:
        with open(file, encoding="utf-8") as text:
            return text.read()
    except OSError as error:
        raise RecipeError("KB100", f"cannot read the recipe: {error.strerror}", at=file) from error
    except UnicodeDecodeError as error:
        raise RecipeError("KB100", "the recipe is not UTF-8 text", at=file, hint="save it as UTF-8") from error


def _raise_with_the_rest(problems: list[KittybuildError], recipe: Recipe | None, builders: Builders) -> None:
    """Raise these problems of a recipe, and all others that can be told already."""
    from kittybuild.planner.problems import all_problems

    raise_all(all_problems(problems, recipe, builders))


def recipe_of(text: str, file: str, builders: Builders = BUILTIN, numerics: str | None = None) -> Recipe:
    """The recipe that a text says. `file` need not be there: paths count from its folder, beside it is the lock.

    Raises UsageError, RecipeError or Problems.
    """
    classes = builders.classes()
    if numerics is not None and numerics not in classes:
        raise UsageError("KB006", f"there are no numerics {numerics!r}", hint=nearest(numerics, classes))
    recipe, problems = parse_partly(text, file, builders.catalogue(), numerics)
    if problems:
        _raise_with_the_rest(problems, recipe, builders)
    assert recipe is not None  # without problems there is one
    return recipe


def prepare(
    recipe: Recipe,
    stages: Sequence[str] = (),
    folder: str | None = None,
    builders: Builders = BUILTIN,
    capability: str | None = None,
    offline: bool = False,
    places: Mapping[str, str] | None = None,
    lock: Mapping[str, Pin] | None = None,
) -> Prepared:
    """Find the sources and name the outputs. `folder` takes the place of the one output's own.

    Sources on the Hub are what the recipe's lock (or `lock`) says; those that it lacks are asked for, unless `offline`.
    `capability`: the instruction set that torch is told to use (ATEN_CPU_CAPABILITY), if it is told. `places`: where
    sources lie, whatever the recipe says; raises UsageError KB010 for one that it does not name.
    """
    wanted = targets(recipe, stages)
    here = os.path.dirname(os.path.abspath(recipe.file))
    folders = {name: os.path.join(here, recipe.outputs[name].folder) for name in wanted if name in recipe.outputs}
    if folder is not None:
        if len(wanted) != 1:
            raise UsageError(
                "KB002", f"one folder for {len(wanted)} stages", hint=f"name the stage: {', '.join(wanted)}"
            )
        folders = {wanted[0]: os.path.abspath(folder)}
    decls = source_names(recipe)
    for name, path in (places or {}).items():
        _check_source(recipe, name, decls)
        decls[name] = SourceDecl(os.path.abspath(path), at=decls[name].at)
    web = Web(offline=offline)
    try:
        paths = locate(recipe, decls)
        _check_folders(recipe, folders, paths)
        pinned = pinned_sources(decls, paths, read_lock(recipe.file) if lock is None else lock, web)
    except KittybuildError as error:
        _raise_with_the_rest([error], recipe, builders)
        raise
    depends = any(by_machine(stage, builders) for stage in recipe.stages.values())
    machine = this_machine(capability) if depends else None
    prints = fingerprints(paths) | {name: pin.fingerprint for name, pin in pinned.pins.items()}
    keys = stage_keys(recipe, wanted, prints, builders, machine)
    return Prepared(recipe, wanted, folders, decls, paths, keys, pinned.pins, pinned.fresh, web, machine)


@dataclass(frozen=True)
class LockReport:
    """What `lock` did: the file, its pins, and for each source that has another pin now what changed, line by line."""

    path: str
    pins: Mapping[str, Pin]
    changes: Mapping[str, tuple[str, ...]]


def lock(recipe: Recipe, update: Sequence[str] = (), offline: bool = False) -> LockReport:
    """Pin the sources that the recipe's lock lacks, and anew those in `update`; pins of other sources stay.

    Raises UsageError KB010 for a name that is no source, and all problems with sources at once.
    """
    decls = source_names(recipe)
    for name in update:
        _check_source(recipe, name, decls)
    before = read_lock(recipe.file)
    after = locked(decls, locate(recipe, decls), before, update, Web(offline=offline))
    changes = {
        name: differences(before.get(name), after.get(name))
        for name in dict.fromkeys((*before, *after))
        if before.get(name) != after.get(name)
    }
    return LockReport(write_lock(recipe.file, after), after, changes)


def _check_source(recipe: Recipe, name: str, decls: Mapping[str, SourceDecl]) -> None:
    if name not in decls:
        raise UsageError("KB010", f"there is no source {name!r}", at=recipe.file, hint=nearest(name, decls))


def _check_folders(recipe: Recipe, folders: Mapping[str, str], paths: Mapping[str, str]) -> None:
    """No output takes the place of another or of what is read, nor becomes a part of it."""
    taken = {os.path.realpath(path): f"the source {name}" for name, path in paths.items() if os.path.isdir(path)}
    for stage, folder in folders.items():
        at = str(recipe.outputs[stage].at) if stage in recipe.outputs else recipe.file
        real = os.path.realpath(folder)
        for other, what in taken.items():
            if real == other or real.startswith(other + os.sep):
                where = "is the folder of" if real == other else "lies in the folder of"
                message = f"the output folder of {stage} {where} {what}"
                raise RecipeError("KB114", message, at=at, hint="name another folder")
        taken[real] = f"the output {stage}"


def plan(prepared: Prepared, store: Store | None, builders: Builders = BUILTIN) -> Known:
    """Every tensor as a step, with what is known of it: reads headers, starts no torch. `Known.plan` is the plan."""
    from kittybuild.planner.spectra import known_spectra

    try:
        sources = open_all(prepared.paths, prepared.pins, prepared.web)
    except KittybuildError as error:
        _raise_with_the_rest([error], prepared.recipe, builders)
        raise
    known = _lowered(prepared, sources, store, builders, {})
    if known.plan.open and (spectra := known_spectra(known, known.plan.open)) is not None:
        known = _lowered(prepared, sources, store, builders, spectra)
    return known


def _lowered(prepared: Prepared, sources: Sources, store: Store | None, builders: Builders, spectra: Spectra) -> Known:
    from kittybuild.planner.lower import lower

    made = lower(prepared.recipe, prepared.wanted, sources, builders, prepared.machine, spectra)
    unpinned = tuple(
        f"{prepared.decls[name].at}: {name} was not in the lock: commit {prepared.pins[name].facts['commit']}"
        for name in prepared.fresh
    )
    return _looked_up(replace(made, notes=(*made.notes, *unpinned)), sources, store)


def _looked_up(made: Plan, sources: Sources, store: Store | None) -> Known:
    from kittybuild.planner.known import Known

    known = Known(made, sources, store)
    for name in known.plan.stages:
        known.look_up(name)
    return known


def explain(
    prepared: Prepared, store: Store | None, tensor: str, builders: Builders = BUILTIN
) -> tuple[Explanation, ...]:
    """What makes the tensor of that name in each stage that has it, and where its parameters come from."""
    from kittybuild.planner.explain import explanations
    from kittybuild.planner.lower import origins

    known = plan(prepared, store, builders)
    found = origins(prepared.recipe, prepared.wanted, known.sources, builders, prepared.machine, tensor)
    return explanations(known, found, prepared.recipe, tensor)


def build(
    prepared: Prepared,
    store: Store,
    *,
    memory: int = MEMORY,
    jobs: int = 1,
    processes: bool = True,
    events: Events | None = None,
    builders: Builders = BUILTIN,
    attest: SigningKey | None = None,
) -> BuildReport:
    """Build the wanted stages and publish their folders. Raises a KittybuildError; what was finished is kept.

    `memory`: bytes for all workers; `processes`: each of the `jobs` is a process of its own, else a thread.
    `attest`: the key that signs an attestation of each folder.
    """
    started = time.monotonic()
    limits = memory, jobs, processes and builders.files is not None  # else no other process could load them
    _pin_fresh(prepared)
    ready = _shortcut(prepared, store)
    if ready:
        manifests, told = ready
        computed = written = dict.fromkeys(manifests, 0)
        amounts, notes = Moved(), (*prepared.recipe.notes, *_ignored(prepared.recipe, told))
    else:
        manifests, told, results, amounts, notes = _run(prepared, store, limits, events, builders)
        computed = {name: result.computed for name, result in results.items()}
        written = {name: result.written for name, result in results.items()}
    stages = {name: _report(manifest, computed[name], store) for name, manifest in manifests.items()}
    outputs = {}
    for name, folder in prepared.folders.items():
        _publish(prepared, name, manifests, told, store, builders, attest)
        shards = len(manifests[name].shards)
        outputs[name] = OutputReport(folder, written[name], shards - written[name])
    seconds = time.monotonic() - started
    return BuildReport(stages, outputs, amounts.read, amounts.written, amounts.workers, seconds, notes, amounts.fetched)


def _pin_fresh(prepared: Prepared) -> None:
    """Write down what sources on the Hub were found to be, so that the next build reads the same."""
    if prepared.fresh:
        new = {name: prepared.pins[name] for name in prepared.fresh}
        write_lock(prepared.recipe.file, {**read_lock(prepared.recipe.file), **new})


def check_models(report: BuildReport) -> list[str]:
    """Compare every output folder with its config.json; what could not be compared, as notes.

    Raises VerifyError KB601, or Problems. It imports transformers and torch, and runs no code of the models.
    """
    from kittybuild.executor.meta_model import check_model

    problems: list[KittybuildError] = []
    notes = []
    for output in report.outputs.values():
        try:
            if why := check_model(output.folder):
                notes.append(f"{output.folder}: the model was not checked: {why}")
        except VerifyError as error:
            problems.append(error)
    raise_all(problems)
    return notes


def _report(manifest: Manifest, computed: int, store: Store) -> StageReport:
    counts = store.nonfinite(tensor.ref.digest for tensor in manifest.tensors)
    nonfinite = {tensor.name: counts[tensor.ref.digest] for tensor in manifest.tensors if tensor.ref.digest in counts}
    total = len(manifest.tensors)
    return StageReport(total, computed, total - computed, manifest.digest, nonfinite)


def _shortcut(prepared: Prepared, store: Store) -> tuple[dict[str, Manifest], bytes] | None:
    """The manifests of all stages, where an equal build made them and all packs of the wanted ones are there."""
    manifests = {}
    for name, key in prepared.keys.items():
        digest = store.shortcut(key)
        manifest = store.manifest(digest) if digest else None
        if manifest is None:
            if name in prepared.wanted:
                return None
            continue  # a stage of which nothing was needed has none
        if name in prepared.wanted:
            if not all(store.pack(shard.pack) for shard in manifest.shards):
                return None
            if any(store.read_file(file.digest) is None for file in manifest.files):
                return None
        manifests[name] = manifest
    found = record(prepared, store)
    return (manifests, found) if found is not None else None


def record(prepared: Prepared, store: Store) -> bytes | None:
    """The `lock` and the `derivations` of a finished build, as JSON; None where the store has none."""
    digest = store.shortcut(_record_key(prepared))
    return store.read_file(digest) if digest else None


def _record_key(prepared: Prepared) -> Digest:
    """The name of what is known of a build beside its manifests: lock and derivations."""
    return tagged("kittybuild.record.v1", [[name, key.hex] for name, key in prepared.keys.items()])


def _ignored(recipe: Recipe, told: bytes) -> list[str]:
    """What an equal build said of the tensors that it left out."""
    found = json.loads(told)["lock"].get("ignored")
    if not found:
        return []
    from kittybuild.planner.fitting import ignored_notes

    return [note for name, rules in found.items() for note in ignored_notes(recipe.stages[name].at, rules)]


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes read, written and fetched, and the most memory that workers took."""

    read: int = 0
    written: int = 0
    workers: int = 0
    fetched: int = 0


Ran = tuple[dict[str, Manifest], bytes, "dict[str, StageResult]", Moved, tuple[str, ...]]


def _run(
    prepared: Prepared, store: Store, limits: tuple[int, int, bool], events: Events | None, builders: Builders
) -> Ran:
    from kittybuild.executor.events import Silent
    from kittybuild.executor.fetch import fetch
    from kittybuild.executor.run import Limits, run
    from kittybuild.planner.fetching import downloads
    from kittybuild.planner.lineage import lineage
    from kittybuild.planner.lower import only
    from kittybuild.publish.companions import companion_files
    from kittybuild.publish.extraction import extraction_files

    events = events or Silent()
    found = store.salvage()
    if found.tensors:
        events.note(f"an interrupted build left {found.tensors} finished tensors: they are used")
    known = plan(prepared, store, builders)
    needed = downloads(known)
    fetched = fetch(needed, events)
    before: dict[str, StageResult] = {}
    if known.plan.open:  # ranks hang on singular values: these first
        first = _looked_up(only(known.plan, known.plan.open), known.sources, store)
        before, _ = run(first, store, builders, Limits(*limits), events)
        known = plan(prepared, store, builders)
    known = _looked_up(known.plan, known.sources, store) if needed else known  # what was verified is known better
    results, amounts = run(known, store, builders, Limits(*limits), events)
    for name in before.keys() & results.keys():
        results[name].computed += before[name].computed
    manifests = {}
    for name, stage in known.plan.stages.items():
        files = companion_files(stage, known.sources, store) if stage.shards else ()
        files = (*files, *extraction_files(stage, known, store)) if stage.shards else files
        shards = tuple(results[name].shards) if stage.shards else ()
        manifests[name] = Manifest(_tensors(stage, known), shards, files)
        store.put_manifest(manifests[name])
    ignored = {name: stage.ignored for name, stage in known.plan.stages.items()}
    lock = lock_json(pins(known, prepared.decls, prepared.pins), versions(), ignored)
    told = canonical({"lock": lock, "derivations": lineage(known)})
    store.set_shortcut(_record_key(prepared), store.put_file(told))
    for name, key in prepared.keys.items():
        if name in manifests:  # of a stage of which nothing was needed there is none
            store.set_shortcut(key, manifests[name].digest)
    store.drop_salvaged()
    moved = Moved(amounts.read, amounts.written, amounts.workers, fetched)
    return manifests, told, results, moved, known.plan.notes


def _tensors(stage: StagePlan, known: Known) -> tuple[ManifestTensor, ...]:
    found = []
    for name, step in stage.steps.items():
        ref = known.ref(step, stage.name, name)
        assert ref is not None  # the run digested or made every tensor
        found.append(ManifestTensor(name, ref, known.key(step) if isinstance(step, Derivation) else None))
    return tuple(found)


def _publish(
    prepared: Prepared,
    name: str,
    manifests: Mapping[str, Manifest],
    told: bytes,
    store: Store,
    builders: Builders,
    attest: SigningKey | None,
) -> None:
    from kittybuild.publish.folder import ATTESTATION, publish
    from kittybuild.publish.texts import folder_texts

    folder, manifest = prepared.folders[name], manifests[name]
    texts = folder_texts(prepared.recipe, name, manifest, json.loads(told), folder, builders.methods(), bool(attest))
    if attest:
        from kittybuild.publish.attest import attestation

        texts[ATTESTATION] = attestation(manifest, texts, store, attest)
    publish(manifest, folder, texts, store)
    # With all that a build with nothing to do looks for.
    also = [Digest.of(told), *(manifests[stage].digest for stage in manifests if stage not in prepared.folders)]
    recipe = os.path.abspath(prepared.recipe.file)
    store.set_root(name, folder, manifest.digest, also, recipe if os.path.isfile(recipe) else None)


__all__ = [
    "BuildReport",
    "LockReport",
    "OutputReport",
    "Plan",
    "Prepared",
    "StageReport",
    "build",
    "check_models",
    "explain",
    "lock",
    "plan",
    "prepare",
    "read_recipe",
    "recipe_of",
    "recipe_text",
    "record",
]
