"""`kittybuild cache gc` and `roots`: what a cache keeps, and deleting the rest. The plan is shown first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kittybuild.cli.caches import bucket
from kittybuild.cli.common import JSON, Duration, amount, answers
from kittybuild.errors import UsageError

if TYPE_CHECKING:
    from kittybuild.store.remote.gc import RemotePlan
    from kittybuild.store.remote.roots import Root


@click.command("gc")
@click.argument("url")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option(
    "--older-than",
    type=Duration("1d"),
    default="7d",
    metavar="TIME",
    show_default=True,
    help="Delete only what was put so long ago: longer than any push takes.",
)
@JSON
@answers
def gc(url: str, dry_run: bool, older_than: float, as_json: bool) -> dict[str, Any]:
    """Delete what no push keeps in a cache."""
    from kittybuild.store.remote.gc import collect, plan_gc

    found = bucket(url)
    plan = plan_gc(found, older_than)
    if not as_json:
        _print(plan)
    gone = () if dry_run else collect(found, plan)
    if not dry_run and not as_json:
        click.echo(f"deleted {len(gone)} objects, freed {amount(sum(one.size for one in gone))}")
    return {
        "ok": True,
        "dry_run": dry_run,
        "delete": [{"object": one.name, "bytes": one.size} for one in (plan.delete if dry_run else gone)],
        "roots": plan.roots,
        "rooted_bytes": plan.rooted,
        "young_bytes": plan.young,
        "freed": plan.freed if dry_run else sum(one.size for one in gone),
    }


@click.command("roots")
@click.argument("url")
@click.option("--drop", metavar="NAME", multiple=True, help="Keep nothing under this name; may be given again.")
@click.option("--signer", metavar="KEY", help="Drop only what this key (team-1) keeps.")
@JSON
@answers
def roots(url: str, drop: tuple[str, ...], signer: str | None, as_json: bool) -> dict[str, Any]:
    """List what a cache keeps and for whom, or drop some. Deletes no tensors: that is `cache gc`."""
    from kittybuild.store.remote.gc import drop as dropped_from
    from kittybuild.store.remote.gc import listed_roots

    found = bucket(url)
    dropped: list[Root] = []
    for name in drop:
        gone = dropped_from(found, name, signer)
        if not gone:
            hint = "`kittybuild cache roots` lists them"
            raise UsageError("KB012", f"the cache keeps nothing under the name {name!r}", at=url, hint=hint)
        dropped += gone
    left = [
        {"name": root.name, "signer": root.signer, "put": round(told.put), "blobs": len(root.blobs)}
        for root, told in listed_roots(found)
    ]
    if not as_json:
        for root in dropped:
            click.echo(f"dropped {root.name} of {root.signer}")
        for one in left:
            click.echo(f"{one['name']} of {one['signer']}: {one['blobs']} blobs")
    return {"ok": True, "roots": left, "dropped": [{"name": root.name, "signer": root.signer} for root in dropped]}


def _print(plan: RemotePlan) -> None:
    click.echo(f"{len(plan.delete)} objects to delete, {amount(plan.freed)}")
    click.echo(f"stays: {amount(plan.rooted)} for {plan.roots} roots, {amount(plan.young)} that were put lately")
