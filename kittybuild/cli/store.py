"""`kittybuild store`: look after the store. What its commands have in common, and those that only look."""

from __future__ import annotations

import os
from typing import Any

import click

from kittybuild.cli.common import JSON, STORE, amount, answers
from kittybuild.cli.store_check import check, repair
from kittybuild.cli.store_gc import gc
from kittybuild.cli.store_open import existing
from kittybuild.errors import UsageError
from kittybuild.store.store import Root, Store


@click.group("store")
def command() -> None:
    """Look after the store."""


@command.command("info")
@STORE
@JSON
@answers
def info(store: str | None, as_json: bool) -> dict[str, Any]:
    """Show where the store is, what it holds and for whom."""
    with existing(store) as opened:
        found, used = opened.info().to_json(), opened.used_by()
        document = {"ok": True, "store": opened.root, **found, "roots": [use.to_json() for use in used]}
    if not as_json:
        for key, value in found.items():
            shown = amount(value) if isinstance(value, int) and key.endswith("bytes") else value
            click.echo(f"{key.replace('_', ' ')}: {shown}")
        for use in used:
            alone = f"{amount(use.bytes)}, {amount(use.alone)} of it for this alone"
            click.echo(
                f"kept for {use.root.name} in {use.root.folder}: {alone}{'' if use.there else ' (no such folder)'}"
            )
    return document


@command.command("roots")
@STORE
@click.option("--drop", metavar="DIR", multiple=True, help="Keep nothing for the output in DIR; may be given again.")
@click.option("--drop-missing", is_flag=True, help="Keep nothing for output folders that are not there.")
@JSON
@answers
def roots(store: str | None, drop: tuple[str, ...], drop_missing: bool, as_json: bool) -> dict[str, Any]:
    """List the outputs that the store keeps everything for, or drop some. Deletes no tensors: that is `store gc`."""
    with existing(store) as opened:
        dropped = _drop(opened, [os.path.abspath(folder) for folder in drop], missing=drop_missing)
        left = opened.roots()
    if not as_json:
        for root in dropped:
            click.echo(f"dropped {root.name} in {root.folder}")
        for root in left:
            click.echo(f"{root.name} in {root.folder}{'' if os.path.isdir(root.folder) else ' (no such folder)'}")
    return {"ok": True, "roots": [_shown(root) for root in left], "dropped": [_shown(root) for root in dropped]}


def _drop(store: Store, folders: list[str], *, missing: bool) -> list[Root]:
    found = store.roots()
    for folder in folders:
        if not any(root.folder == folder for root in found):
            hint = "`kittybuild store roots` lists them"
            raise UsageError("KB012", "the store keeps nothing for this folder", at=folder, hint=hint)
    chosen = [root for root in found if root.folder in folders or (missing and not os.path.isdir(root.folder))]
    for root in chosen:
        store.drop_root(root.name, root.folder)
    return chosen


def _shown(root: Root) -> dict[str, Any]:
    return {"output": root.name, "folder": root.folder, "manifest": root.manifest.hex, "recipe": root.recipe}


for _command in (gc, check, repair):
    command.add_command(_command)
