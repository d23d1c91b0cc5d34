"""`kittybuild build`: make the outputs of a recipe."""

from __future__ import annotations

import contextlib
import resource
import sys
from typing import TYPE_CHECKING, Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.caches import caches_options, offers
from kittybuild.cli.common import (
    BUDGET,
    JSON,
    READING,
    RECIPE,
    STORE,
    VERBOSE,
    WORKERS,
    Found,
    amount,
    answers,
    capability,
    cores,
    note,
    output,
    store_folder,
)
from kittybuild.cli.progress import shown
from kittybuild.errors import MOST_NAMED, UsageError, VerifyError
from kittybuild.store.store import Store

if TYPE_CHECKING:
    from kittybuild.store.remote.keys import SigningKey


def peak_rss() -> int:
    """The most memory that this process had, in bytes."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:  # Linux counts a parent's peak in its child's rusage, but not here
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@click.command("build")
@RECIPE
@output("The output folder (instead of the recipe's).")
@STORE
@BUDGET
@WORKERS
@READING
@caches_options
@click.option("--check-model", is_flag=True, help="Compare each output with its config.json (needs transformers).")
@click.option("--check", is_flag=True, help="Build all of it a second time, in an empty store, and compare.")
@click.option(
    "--attest", metavar="KEYFILE", help="Sign an attestation of each output with this key, as `cache keygen` makes it."
)
@JSON
@VERBOSE
@answers
def command(
    recipe: str,
    stages: tuple[str, ...],
    output: str | None,
    store: str | None,
    memory: int,
    jobs: int | None,
    workers: str,
    numerics: str | None,
    files: tuple[str, ...],
    offline: bool,
    check_model: bool,
    check: bool,
    attest: str | None,
    as_json: bool,
    verbose: bool,
    **asked: Any,
) -> dict[str, Any]:
    """Build the outputs of RECIPE (a recipe of ours or a mergekit YAML), or the STAGEs named."""
    builders = load(files)
    parsed = api.read_recipe(recipe, builders, numerics, offline)
    if not parsed.outputs and output is None and not stages:
        raise UsageError("KB004", "the recipe names no output", at=recipe, hint="add `-o FOLDER`")
    with shown() as events, Store.open(store_folder(store, recipe)) as opened:
        caches = offers(recipe, events.note, **asked)
        prepared = api.prepare(parsed, stages, output, builders, capability(), offline, caches=caches is not None)
        report = api.build(
            prepared,
            opened,
            memory=memory,
            jobs=jobs or cores(),
            processes=workers == "processes",
            events=events,
            builders=builders,
            attest=_key(attest) if attest else None,
            offers=caches,
        )
        if check:
            from kittybuild.reproduce import Limits, rebuilt

            limits = Limits(memory, jobs or cores(), workers == "processes")
            other = rebuilt(prepared, report, opened, limits=limits, builders=builders, events=events)
    notes = list(report.notes) + (api.check_models(report) if check_model else [])
    document = told(report, notes, as_json, verbose)
    if check and other:
        message = "built again, these came out otherwise:" + "".join(f"\n  {one}" for one in other[:MOST_NAMED])
        hint = "look whether the machine computes right; if it does, please report it"
        raise Found([VerifyError("KB607", message, at=recipe, hint=hint)], {**document, "differences": list(other)})
    return document


def told(report: api.BuildReport, notes: list[str], as_json: bool, verbose: bool) -> dict[str, Any]:
    """The JSON document of a build; without `as_json` it is printed for a person."""
    document = _document(report, notes)
    if not as_json:
        _print(report, notes, verbose)
    for name, stage in report.stages.items():
        for tensor, count in stage.nonfinite.items():
            click.echo(f"warning: {name}: {tensor} has {count} elements that are NaN or infinite", err=True)
    return document


def _document(report: api.BuildReport, notes: list[str]) -> dict[str, Any]:
    return {
        "ok": True,
        "stages": {name: stage.to_json() for name, stage in report.stages.items()},
        "outputs": {name: out.to_json() for name, out in report.outputs.items()},
        "bytes": {"read": report.bytes_read, "written": report.bytes_written},
        "downloaded": report.bytes_fetched,
        "seconds": round(report.seconds, 3),
        "peak_rss": peak_rss() + report.workers_peak,
        "notes": notes,
    }


def _key(path: str) -> SigningKey:
    from kittybuild.store.remote.keys import SigningKey

    return SigningKey.read(path)


def _print(report: api.BuildReport, notes: list[str], verbose: bool) -> None:
    for text in notes:
        note(text)
    for name, stage in report.stages.items():
        fetched = f"{stage.fetched} fetched, " if stage.fetched else ""
        click.echo(
            f"{name}: {stage.tensors} tensors, {stage.computed} computed, {fetched}{stage.cached} from the store"
        )
        if verbose:
            click.echo(f"  manifest {stage.manifest}")
    for out in report.outputs.values():
        click.echo(f"{out.folder}: {out.shards_written} shards written, {out.shards_linked} linked")
    read, written = amount(report.bytes_read), amount(report.bytes_written)
    fetched = f"downloaded {amount(report.bytes_fetched)}, " if report.bytes_fetched else ""
    peak = amount(peak_rss() + report.workers_peak)
    click.echo(f"{fetched}read {read}, wrote {written}, {report.seconds:.1f} s, peak memory {peak}")
