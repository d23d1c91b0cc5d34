"""A build: what an equal build made is looked up, else the plan is run; then folders are published."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kittybuild.api.planning import looked_up, plan
from kittybuild.api.preparing import Prepared
from kittybuild.api.reports import BuildReport, OutputReport, StageReport
from kittybuild.builders.base import Builders
from kittybuild.builders.registry import BUILTIN
from kittybuild.checkpoint.sources.lockfile import read_lock, write_lock
from kittybuild.digest import Digest, canonical, tagged
from kittybuild.errors import KittybuildError, VerifyError, raise_all
from kittybuild.model.derivation import Derivation
from kittybuild.model.lock import lock_json
from kittybuild.model.manifest import Manifest, ManifestTensor
from kittybuild.model.plan import StagePlan
from kittybuild.model.recipe import Recipe
from kittybuild.planner.locking import pins, versions
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.executor.events import Events
    from kittybuild.executor.run import StageResult
    from kittybuild.planner.known import Known
    from kittybuild.planner.offers import Offers
    from kittybuild.store.remote.keys import SigningKey

MEMORY = 4_000_000_000


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
    offers: Offers | None = None,
) -> BuildReport:
    """Build the wanted stages and publish their folders. Raises a KittybuildError; what was finished is kept.

    `memory`: bytes for all workers; `processes`: each of the `jobs` is a process of its own, else a thread.
    `attest`: the key that signs an attestation of each folder. `offers`: what remote caches have.
    """
    started = time.monotonic()
    limits = memory, jobs, processes and builders.files is not None  # else no other process could load them
    _pin_fresh(prepared)
    ready = built(prepared, store)
    if ready:
        manifests, told = ready
        computed = written = from_caches = dict.fromkeys(manifests, 0)
        amounts, notes = Moved(), (*prepared.recipe.notes, *_ignored(prepared.recipe, told))
    else:
        manifests, told, results, amounts, notes = _run(prepared, store, limits, events, builders, offers)
        computed = {name: result.computed for name, result in results.items()}
        from_caches = {name: result.fetched for name, result in results.items()}
        written = {name: result.written for name, result in results.items()}
    stages = {name: _report(manifest, computed[name], from_caches[name]) for name, manifest in manifests.items()}
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


def _report(manifest: Manifest, computed: int, fetched: int) -> StageReport:
    total, nonfinite = len(manifest.tensors), dict(manifest.nonfinite)
    return StageReport(total, computed, total - computed - fetched, manifest.digest, nonfinite, fetched)


def built(prepared: Prepared, store: Store) -> tuple[dict[str, Manifest], bytes] | None:
    """The manifests of all stages and the `record`, where an equal build made them and all that is wanted is there."""
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
    prepared: Prepared,
    store: Store,
    limits: tuple[int, int, bool],
    events: Events | None,
    builders: Builders,
    offers: Offers | None,
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
    known = plan(prepared, store, builders, offers)
    needed = downloads(known)
    fetched = fetch(needed, events)
    before: dict[str, StageResult] = {}
    if known.plan.open:  # ranks hang on singular values: these first
        first = looked_up(only(known.plan, known.plan.open), known.sources, store, offers)
        before, _ = run(first, store, builders, Limits(*limits), events)
        known = plan(prepared, store, builders, offers)
    if needed:  # what was verified is known better
        known = looked_up(known.plan, known.sources, store, offers)
    results, amounts = run(known, store, builders, Limits(*limits), events)
    for name in before.keys() & results.keys():
        results[name].computed += before[name].computed
    manifests = {}
    for name, stage in known.plan.stages.items():
        files = companion_files(stage, known.sources, store) if stage.shards else ()
        files = (*files, *extraction_files(stage, known, store)) if stage.shards else files
        shards = tuple(results[name].shards) if stage.shards else ()
        tensors = _tensors(stage, known)
        manifests[name] = Manifest(tensors, shards, files, _nonfinite(tensors, store))
        store.put_manifest(manifests[name])
    ignored = {name: stage.ignored for name, stage in known.plan.stages.items()}
    lock = lock_json(pins(known, prepared.decls, {**prepared.pins, **prepared.absent}), versions(), ignored)
    told = canonical({"lock": lock, "derivations": lineage(known)})
    store.set_shortcut(_record_key(prepared), store.put_file(told))
    for name, key in prepared.keys.items():
        if name in manifests:  # of a stage of which nothing was needed there is none
            store.set_shortcut(key, manifests[name].digest)
    store.drop_salvaged()
    fetched += offers.caches.bytes_fetched if offers else 0
    moved = Moved(amounts.read, amounts.written, amounts.workers, fetched)
    return manifests, told, results, moved, known.plan.notes


def _tensors(stage: StagePlan, known: Known) -> tuple[ManifestTensor, ...]:
    found = []
    for name, step in stage.steps.items():
        ref = known.ref(step, stage.name, name)
        assert ref is not None  # the run digested or made every tensor
        found.append(ManifestTensor(name, ref, known.key(step) if isinstance(step, Derivation) else None))
    return tuple(found)


def _nonfinite(tensors: Sequence[ManifestTensor], store: Store) -> tuple[tuple[str, int], ...]:
    counts = store.nonfinite(tensor.ref.digest for tensor in tensors)
    return tuple(sorted((t.name, counts[t.ref.digest]) for t in tensors if t.ref.digest in counts))


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
