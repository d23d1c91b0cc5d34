"""What the programs share: the peers' options, and how a lowered recipe is shown or built.

An option of the peers has its meaning here, or is accepted and answered with a note (`recipe.peer_options.NOTES`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import click

from kittybuild import api
from kittybuild.builders.plugins import load
from kittybuild.cli.build import told
from kittybuild.cli.common import (
    JSON,
    MEMORY,
    READING,
    STORE,
    answers,
    capability,
    cores,
    jobs,
    store_folder,
)
from kittybuild.cli.progress import Quiet, shown
from kittybuild.errors import RecipeError, UsageError
from kittybuild.model.recipe import Recipe
from kittybuild.recipe.peer_options import NOTES
from kittybuild.recipe.programs import Settings, peer_size
from kittybuild.recipe.yamltext import Document, read_documents
from kittybuild.store.store import Store

_ANYWAY = frozenset({"--copy-tokenizer", "--write-model-card", "--safe-serialization"})
"""What is done anyway: only the `--no-` of these is answered."""


def accepted(notes: Mapping[str, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options that a command takes and answers with a note."""

    def declare(command: Callable[..., Any]) -> Callable[..., Any]:
        for words in reversed(list(notes)):
            command = _accepted(words, notes[words])(command)
        return command

    return declare


def _accepted(words: str, note: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    text, _, metavar = words.partition(" ")
    names = text.split(",")
    first = names[0].partition("/")[0]
    default = first in _ANYWAY

    def noted(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        if value not in (None, default, ()):
            said = first if value is not False else names[0].partition("/")[2]
            _notes(ctx).append(f"{said}: {note}")

    kind: dict[str, Any] = {"metavar": metavar} if metavar else {"is_flag": True, "default": default}
    return click.option(*names, callback=noted, expose_value=False, help=f"Accepted: {note}.", **kind)


def _notes(ctx: click.Context) -> list[str]:
    found: list[str] = ctx.meta.setdefault("kittybuild.notes", [])
    return found


class PeerSize(click.ParamType):  # type: ignore[type-arg]
    """A size in the peers' words: 5B is 5 GB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else peer_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


_SHARED = (
    click.option("--print-recipe", is_flag=True, help="Show the recipe that says the same, and stop."),
    STORE,
    MEMORY,
    jobs("--num-threads", "-j"),
    READING,
    click.option("--out-shard-size", type=PeerSize(), metavar="SIZE", help="The most bytes of a shard: 5B is 5 GB."),
    click.option("--random-seed", type=int, metavar="N", help="What methods draw from that draw random numbers."),
    click.option(
        "--unsafe-truncate-embeddings/--no-unsafe-truncate-embeddings",
        default=False,
        help="Cut vocabularies of unequal sizes to what all models have.",
    ),
    accepted(NOTES),
    click.option("--quiet/--no-quiet", default=False, help="Show no progress."),
    click.option("-v", "--verbose", count=True, help="Say more."),
    JSON,
)


@dataclass(frozen=True)
class Common:
    """What the shared options of a program say."""

    store: str | None
    memory: int
    jobs: int | None
    numerics: str | None
    files: tuple[str, ...]
    offline: bool
    print_recipe: bool
    out_shard_size: int | None
    random_seed: int | None
    unsafe_truncate_embeddings: bool
    quiet: bool
    verbose: int
    as_json: bool

    @property
    def settings(self) -> Settings:
        """What of it stands in a recipe."""
        return Settings(self.random_seed, self.out_shard_size, self.unsafe_truncate_embeddings)

    def read(self, file: str) -> Recipe:
        """The configuration in a file, as a recipe; so all that is wrong with it is told with its place."""
        recipe = api.read_recipe(file, load(self.files), self.numerics, self.offline)
        if recipe.dialect != "mergekit":
            raise UsageError("KB017", "this is a recipe of ours", at=file, hint=f"kittybuild build {file}")
        return recipe

    def answer(self, lowered: str, file: str, read: Recipe | None = None, folder: str | None = None) -> dict[str, Any]:
        """Show the recipe, or build it. `file`: where the recipe would lie.

        `read`: the configuration; where it is its own recipe, it is built into `folder`.
        """
        notes = _notes(click.get_current_context())
        if self.print_recipe:
            if not self.as_json:
                click.echo(lowered, nl=not lowered.endswith("\n"))
            return {"ok": True, "recipe": lowered, "notes": notes}
        builders = load(self.files)
        own = read is None or read.text != lowered
        recipe = api.recipe_of(lowered, file, builders, self.numerics, self.offline) if own else read
        assert recipe is not None
        prepared = api.prepare(recipe, (), None if own else folder, builders, capability(), self.offline)
        events = nullcontext(Quiet()) if self.quiet else shown()
        with Store.open(store_folder(self.store, file)) as store, events as listening:
            report = api.build(
                prepared,
                store,
                memory=self.memory,
                jobs=self.jobs or cores(),
                processes=os.environ.get("KITTYBUILD_WORKERS", "processes") == "processes",
                events=listening,
                builders=builders,
            )
        return told(report, [*notes, *report.notes], self.as_json, self.verbose > 0)


def program(name: str) -> Callable[[Callable[..., dict[str, Any]]], click.Command]:
    """A command of that name: the function's own arguments and options, and the shared ones as `common`."""

    def declare(function: Callable[..., dict[str, Any]]) -> click.Command:
        @functools.wraps(function)
        def run(**given: Any) -> dict[str, Any]:
            shared = {field.name: given.pop(field.name) for field in fields(Common)}
            return function(**given, common=Common(**shared))

        declared: Callable[..., Any] = answers(run)
        own = declared.__click_params__  # type: ignore[attr-defined]  # they stand before the shared ones
        declared.__click_params__ = []  # type: ignore[attr-defined]
        for option in reversed(_SHARED):
            declared = option(declared)
        declared.__click_params__ += own  # type: ignore[attr-defined]
        return click.command(name)(declared)

    return declare


def documents(file: str) -> tuple[Document, ...]:
    """The documents of a configuration. Raises RecipeError."""
    found = read_documents(api.recipe_text(file), file)
    if not found or not all(isinstance(document.value, dict) for document in found):
        raise RecipeError("KB103", "a configuration is a mapping of keys", at=file, hint="start with `merge_method:`")
    return found


def beside(config: str) -> str:
    """Where the recipe of a configuration would lie, so that paths count from the same folder and the lock is one."""
    return f"{os.path.splitext(config)[0]}.recipe"


def here(folder: str) -> str:
    """Where the recipe of a program without a configuration would lie: in the working folder, named as its output."""
    return f"{os.path.basename(os.path.abspath(folder)) or 'out'}.recipe"


def output(folder: str, file: str) -> str:
    """A folder that is relative to the working folder, as a recipe at `file` writes it."""
    beside_it = os.path.dirname(os.path.abspath(file))
    return folder if os.path.isabs(folder) else os.path.relpath(os.path.abspath(folder), beside_it)
