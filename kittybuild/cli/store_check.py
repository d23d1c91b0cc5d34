"""`kittybuild store check` and `repair`: find what is damaged, put it right, or say which outputs are hurt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import click

from kittybuild.cli.caches import caches_options, offers
from kittybuild.cli.common import JSON, STORE, Duration, Found, amount, answers, cores, note, store_folder
from kittybuild.cli.store_open import existing
from kittybuild.errors import KittybuildError, StoreError
from kittybuild.planner.offers import Offers
from kittybuild.store.check import Damage, Extent
from kittybuild.store.store import Root, Store

Ask = Callable[[str], Offers | None]
"""What caches offer for a recipe."""


class Share(click.ParamType):  # type: ignore[type-arg]
    """A share such as 5%."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(str(value).removesuffix("%")) / 100
        except ValueError:
            share = -1.0
        if not (str(value).endswith("%") and 0 < share <= 1):
            self.fail(f"{value!r} is not a share such as 5%", param, ctx)
        return share


@click.command("check")
@STORE
@click.option("--full", is_flag=True, help="By BLAKE3, not by the quicker XXH3.")
@click.option("--sample", type=Share(), default=1.0, metavar="PERCENT", help="Read only so much, say 5%. Default: all.")
@click.option("--older-than", type=Duration(), default=0.0, help="Only packs that were not checked for so long (30d).")
@JSON
@answers
def check(store: str | None, full: bool, sample: float, older_than: float, as_json: bool) -> dict[str, Any]:
    """Read what the store holds and compare it with its names, what was not read for longest first.

    A check that is cut short is gone on with by the next: `--older-than 1d` leaves out what was just read.
    """
    with existing(store) as opened:
        done = opened.check(Extent(full, sample, older_than))
    document = {"packs": done.packs, "left": done.left, "bytes": done.bytes, "damage": _shown(done.damage)}
    if not as_json:
        click.echo(f"read {done.packs} packs, {amount(done.bytes)}; {done.left} left out; {len(done.damage)} damaged")
    if done.damage:
        raise Found([damage.error() for damage in done.damage], document)
    return {"ok": True, **document}


@click.command("repair")
@STORE
@click.option("--full", is_flag=True, help="Look for damage by BLAKE3, not by the quicker XXH3.")
@click.option("--no-build", is_flag=True, help="Do not build the outputs that are hurt again.")
@caches_options
@JSON
@answers
def repair(store: str | None, full: bool, no_build: bool, as_json: bool, **asked: Any) -> dict[str, Any]:
    """Set aside what is damaged, and make it again: from other copies, else fetched from caches or built; else name
    what is hurt.
    """
    mended = Store.mend_format(store_folder(store, None))
    with existing(store, to_clean=True) as opened:
        done = opened.repair(Extent(full))
        built, hurt = _build(opened, done.hurt, None if no_build else partial(offers, note=note, **asked))
    document = {
        "format_mended": mended,
        "damage": _shown(done.damage),
        "whole": [digest.hex for digest in done.whole],
        "built": [_output(root) for root in built],
        "hurt": [_output(root) for root in hurt],
    }
    if not as_json:
        for damage in done.damage:
            click.echo(f"{damage.path}: {damage.what}")
        click.echo(
            f"{len(done.damage)} damaged, {len(done.whole)} packs put together again, {len(built)} outputs built"
        )
    if hurt:
        raise Found([_hurt(root, why) for root, why in hurt.items()], document)
    return {"ok": True, **document}


def _build(store: Store, roots: tuple[Root, ...], ask: Ask | None) -> tuple[list[Root], dict[Root, str]]:
    """Build outputs again where their recipe is still the one that made them; those that are built, and the others."""
    built, hurt = [], {}
    for root in roots:
        try:
            why = _rebuilt(store, root, ask) if ask else "not built again, as you asked"
        except KittybuildError as error:
            why = f"its build failed: {error.code}: {error.message}"
        if why is None:
            built.append(root)
        else:
            hurt[root] = why
    return built, hurt


def _rebuilt(store: Store, root: Root, ask: Ask) -> str | None:
    """Build one output from its recipe; the answer is why that could not be done."""
    from kittybuild import api

    if root.recipe is None:
        return "its recipe is not known"
    recipe, caches = api.read_recipe(root.recipe), ask(root.recipe)
    alone = api.prepare(recipe, (root.name,), root.folder, caches=caches is not None)
    # The keys of stages depend on what was built together: this output, or all of the recipe.
    together = api.prepare(recipe, caches=caches is not None) if root.name in recipe.outputs else alone
    if root.manifest not in {store.shortcut(prepared.keys[root.name]) for prepared in (alone, together)}:
        return "its recipe, or a source, has changed since"
    api.build(alone, store, jobs=cores(), offers=caches)
    return None


def _hurt(root: Root, why: str) -> StoreError:
    way_out = f"build it again: `kittybuild build {root.recipe or 'RECIPE'} {root.name}`"
    return StoreError("KB712", f"the output {root.name} is hurt: {why}", at=root.folder, hint=way_out)


def _output(root: Root) -> dict[str, Any]:
    return {"output": root.name, "folder": root.folder}


def _shown(damage: tuple[Damage, ...]) -> list[dict[str, Any]]:
    return [
        {"kind": one.kind, "path": one.path, "what": one.what, "hurt": [_output(root) for root in one.hurt]}
        for one in damage
    ]
