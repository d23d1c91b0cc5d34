"""`kittybuild tokensurgeon`: what mergekit-tokensurgeon and mergekitty-tokensurgeon do."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args

import click

from kittybuild.cli.programs import Common, accepted, here, program
from kittybuild.errors import UsageError
from kittybuild.recipe.programs import transplant_text
from kittybuild.recipe.schema import TransplantText

NOTES: Mapping[str, str] = MappingProxyType({"--batch-size N": "--memory says how much memory is used"})


def _choices(key: str) -> click.Choice[str]:
    """The words that a key of the stage may have."""
    return click.Choice(get_args(TransplantText.model_fields[key].annotation))


_SIDES = click.Choice(["no", "yes", "embed", "lm_head"])


@program("tokensurgeon")
@click.argument("model")
@click.argument("donor")
@click.argument("out_path", type=click.Path())
@click.option("-k", "--k", "k", type=click.IntRange(1), help="Shared tokens that a row is made of. Default: 64.")
@click.option("-c/-nc", "--cosine-similarity/--no-cosine-similarity", default=None, help="Neighbours by cosine.")
@click.option("-a", "--approximation-method", type=_choices("approximation_method"), help="Default: omp.")
@click.option("-w", "--weight-scheme", type=_choices("weight_scheme"), help="Default: distance_proportional.")
@click.option("-s", "--subword-method", type=_choices("subword_method"), help="Default: mean.")
@click.option(
    "-b/-nb", "--barycentric/--no-barycentric", default=False, help="As -a common_interpolation -w barycentric."
)
@click.option("-pm", "--prefix-match", type=_SIDES, help="Default: no.")
@click.option("-bm", "--byte-match", type=_SIDES, help="Default: no.")
@click.option("--magikarp/--no-magikarp", default=None, help="Tokens that nobody trained are no help.")
@click.option("-nvn", "--new-vocab-noise", type=float, metavar="X", help="Normal noise added to new rows.")
@click.option("-nvs", "--new-vocab-scale", type=float, metavar="X", help="A factor of new rows.")
@accepted(NOTES)
def command(
    model: str, donor: str, out_path: str, barycentric: bool, common: Common, **options: str | float | None
) -> dict[str, Any]:
    """Give MODEL the tokenizer of DONOR, into OUT_PATH (mergekit-tokensurgeon)."""
    given = {key: value for key, value in options.items() if value is not None}
    if barycentric:
        own = {"approximation_method": "common_interpolation", "weight_scheme": "barycentric"}
        if any(given.get(key, word) != word for key, word in own.items()):
            raise UsageError("KB018", f"--barycentric is {own}", hint="leave -b out, or -a and -w")
        given |= own
    return common.answer(transplant_text(model, donor, given, out_path, common.settings), here(out_path))
