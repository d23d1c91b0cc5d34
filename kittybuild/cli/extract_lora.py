"""The command `extract-lora`: what mergekit-extract-lora and mergekitty-extract-lora do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import click

from kittybuild.cli.programs import Common, accepted, here, program
from kittybuild.errors import UsageError
from kittybuild.recipe.programs import Extract, extract_lora_text

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "--extend-vocab/--no-extend-vocab": "rows that the base lacks are an error, which says what to do",
        "--model_name NAME": "the recipe in the card names the models",
    }
)


@program("extract-lora")
@click.argument("finetuned", required=False)
@click.argument("base", required=False)
@click.argument("out", type=click.Path(), required=False)
@click.option("--model", metavar="MODEL", help="The model; or FINETUNED.")
@click.option("--base-model", metavar="MODEL", help="What it is compared with; or BASE.")
@click.option("--out-path", type=click.Path(), metavar="DIR", help="The adapter's folder; or OUT.")
@click.option("--max-rank", "--rank", type=click.IntRange(1), default=128, show_default=True, help="The most ranks.")
@click.option("--sv-epsilon", type=click.FloatRange(0), metavar="X", default=0, help="Only singular values above it.")
@click.option("--svd", type=click.Choice(["exact", "randomized"]), default="exact", help="Ours: how they are found.")
@click.option("--distribute-scale/--no-distribute-scale", default=True, help="Both factors take a part of the scale.")
@click.option("--embed-lora/--no-embed-lora", default=False, help="Embeddings as factors, and not whole.")
@click.option("--save-module", "saved", metavar="NAME", multiple=True, help="A module that is saved whole.")
@click.option("-i", "--include-regex", "include", metavar="PATTERN", multiple=True, help="Only modules of that name.")
@click.option("-e", "--exclude-regex", "exclude", metavar="PATTERN", multiple=True, help="No module of that name.")
@click.option("--skip-undecomposable/--no-skip-undecomposable", default=False, help="Leave out norms and such.")
@accepted(NOTES)
def command(
    finetuned: str | None,
    base: str | None,
    out: str | None,
    model: str | None,
    base_model: str | None,
    out_path: str | None,
    max_rank: int,
    sv_epsilon: float,
    common: Common,
    **options: Any,
) -> dict[str, Any]:
    """Extract how FINETUNED differs from BASE as a LoRA adapter, into OUT (mergekit-extract-lora)."""
    models = (
        _one("the model", "--model", model, finetuned),
        _one("the base", "--base-model", base_model, base),
        _one("the output", "--out-path", out_path, out),
    )
    extract = Extract(models[0], models[1], max_rank, sv_epsilon, **options)
    return common.answer(extract_lora_text(extract, models[2], common.settings), here(models[2]))


def _one(what: str, option: str, *given: str | None) -> str:
    """What is said once, by an option or by an argument."""
    found = [text for text in given if text is not None]
    if len(found) != 1:
        message = f"{what} is given twice" if found else f"{what} is missing"
        raise UsageError("KB018", message, hint=f"give {option}, or all of FINETUNED BASE OUT")
    return found[0]
