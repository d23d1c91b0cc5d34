"""`kittybuild legacy`: what mergekit-legacy does."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click
import yaml

from kittybuild.cli.programs import Common, accepted, here, program
from kittybuild.errors import UsageError
from kittybuild.recipe.programs import Legacy, multi_text

NOTES: Mapping[str, str] = MappingProxyType({"--naive-count/--no-naive-count": "the peers take it and ignore it"})


@program("legacy")
@click.argument("out_path", type=click.Path())
@click.option("--merge", "models", metavar="MODEL", multiple=True, required=True, help="A model; given again for each.")
@click.option("--density", "densities", type=float, multiple=True, help="Its density; one counts for all.")
@click.option("--weight", "weights", type=float, multiple=True, help="Its weight; one counts for all. The t of slerp.")
@click.option("--method", default="ties", metavar="METHOD", show_default=True, help="The merge method.")
@click.option("--base-model", metavar="MODEL", help="The base.")
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="Divide by the sum of the weights.")
@click.option("--int8-mask/--no-int8-mask", default=False, help="The parameter of that name.")
@click.option("--bf16/--no-bf16", default=False, help="Merge into bfloat16.")
@click.option("--print-yaml/--no-print-yaml", default=False, help="Show the mergekit configuration, too.")
@accepted(NOTES)
def command(
    out_path: str,
    models: tuple[str, ...],
    densities: tuple[float, ...],
    weights: tuple[float, ...],
    method: str,
    base_model: str | None,
    normalize: bool,
    int8_mask: bool,
    bf16: bool,
    print_yaml: bool,
    common: Common,
) -> dict[str, Any]:
    """Merge the models given by --merge into OUT_PATH (mergekit-legacy)."""
    told = Legacy(models, method, base_model, weights, densities, normalize, int8_mask, bf16)
    try:
        config = told.config()
    except ValueError as error:
        raise UsageError("KB018", str(error), hint="give one value, or one for each model") from error
    if print_yaml:
        click.echo(yaml.safe_dump(config, sort_keys=False), err=common.as_json, nl=False)
    return common.answer(multi_text([config], {"merge": out_path}, common.settings), here(out_path))
