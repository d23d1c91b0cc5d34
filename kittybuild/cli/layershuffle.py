"""`kittybuild layershuffle`: what mergekit-layershuffle and mergekitty-layershuffle do."""

from __future__ import annotations

from typing import Any

import click
import yaml

from kittybuild.builders.plugins import load
from kittybuild.cli.programs import Common, here, program
from kittybuild.errors import UsageError
from kittybuild.opened import layer_counts
from kittybuild.recipe.programs import multi_text, shuffled


@program("layershuffle")
@click.argument("out_path", type=click.Path())
@click.option("-m", "--model", "models", metavar="MODEL", multiple=True, required=True, help="A model; one for each.")
@click.option("-w", "--weight", "weights", type=float, multiple=True, help="How often it is taken. Default: all alike.")
@click.option("--print-yaml/--no-print-yaml", default=False, help="Show the mergekit configuration, too.")
@click.option("--write-yaml", metavar="FILE", help="Write the mergekit configuration there.")
@click.option("--dry-run/--no-dry-run", default=False, help="Build nothing.")
@click.option("--fp16/--no-fp16", default=False, help="Into float16.")
@click.option("--full-random/--no-full-random", default=False, help="Layers of any number, in any order.")
def command(
    out_path: str,
    models: tuple[str, ...],
    weights: tuple[float, ...],
    print_yaml: bool,
    write_yaml: str | None,
    dry_run: bool,
    fp16: bool,
    full_random: bool,
    common: Common,
) -> dict[str, Any]:
    """Stack layers drawn at random from the models given by --model, into OUT_PATH (mergekit-layershuffle)."""
    file = here(out_path)
    counts = layer_counts(models, file, load(common.files), offline=common.offline)
    try:
        config = shuffled(counts, weights or [1.0] * len(models), common.random_seed or 0, full=full_random)
    except ValueError as error:
        raise UsageError("KB018", str(error), hint="--weight counts in the order of --model") from error
    config |= {"dtype": "float16"} if fp16 else {}
    text = yaml.safe_dump(config, sort_keys=False)
    if write_yaml:
        _write(write_yaml, text)
    if print_yaml:
        click.echo(text, err=common.as_json, nl=False)
    if dry_run:
        return {"ok": True, "config": config}
    return common.answer(multi_text([config], {"merge": out_path}, common.settings), file)


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError("KB018", f"cannot write the configuration: {error.strerror}", at=path) from error
