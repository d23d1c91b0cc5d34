"""`kittybuild store gc`: delete what no output needs. The plan is shown first, and `--dry-run` leaves it at that."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from kittybuild.cli.common import JSON, STORE, Duration, Size, amount, answers
from kittybuild.cli.store_open import existing
from kittybuild.store.gc import Collected, GcPlan, Policy


@click.command("gc")
@STORE
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option(
    "--max-size", type=Size(), help="Keep more than the outputs need, up to so much, what is dear to make first."
)
@click.option("--older-than", type=Duration(), help="Delete only what was not used for so long (30d, 12h).")
@click.option("--wait", type=Duration(), default="10s", show_default=True, help="How long to wait for running builds.")
@JSON
@answers
def gc(
    store: str | None, dry_run: bool, max_size: int | None, older_than: float | None, wait: float, as_json: bool
) -> dict[str, Any]:
    """Delete what no output needs. Outputs, and what running builds use, are never touched."""
    policy = Policy(max_size, older_than)
    with existing(store, to_clean=not dry_run) as opened:
        plan = opened.plan_gc(policy)
        if not as_json:
            _print(plan)
        done = None if dry_run else opened.collect(policy, patience=wait)
    if done is not None and not as_json:
        click.echo(f"deleted {done.files} files, freed {amount(done.freed)}, wrote {done.repacked} packs anew")
    return _document(plan, done)


def _document(plan: GcPlan, done: Collected | None) -> dict[str, Any]:
    delete = [
        {"kind": doomed.kind, "path": doomed.path, "freed": doomed.freed, "seconds": round(doomed.seconds, 6)}
        for doomed in plan.delete
    ]
    return {
        "ok": True,
        "dry_run": done is None,
        "delete": delete,
        "repack": [{"path": pack.path, "size": pack.size, "stays": pack.stays} for pack in plan.repack],
        "rooted_bytes": plan.rooted,
        "stays_bytes": plan.stays,
        "freed": plan.freed if done is None else done.freed,
    }


def _print(plan: GcPlan) -> None:
    for kind, count in sorted(Counter(doomed.kind for doomed in plan.delete).items()):
        freed = sum(doomed.freed for doomed in plan.delete if doomed.kind == kind)
        click.echo(f"{kind}: {count} to delete, {amount(freed)}")
    for pack in plan.repack:
        click.echo(f"pack to write anew: {pack.path}, {amount(pack.stays)} of {amount(pack.size)}")
    seconds = sum(doomed.seconds for doomed in plan.delete)
    click.echo(f"frees {amount(plan.freed)}; to make it all again takes about {seconds:.1f} s of work")
    click.echo(f"stays: {amount(plan.rooted)} for outputs, {amount(plan.stays)} beside them")
