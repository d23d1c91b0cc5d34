"""`kittybuild pytorch`: what mergekit-pytorch does."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.cli.programs import Common, beside, documents, output, program
from kittybuild.errors import UsageError
from kittybuild.recipe.programs import pytorch_text


@program("pytorch")
@click.argument("config_path", type=click.Path(dir_okay=False))
@click.argument("out_path", type=click.Path())
@click.option("-i", "--tensor-intersection/--no-tensor-intersection", default=False, help="Only what all files have.")
@click.option("-u", "--tensor-union/--no-tensor-union", default=False, help="Each tensor of the files that have it.")
def command(
    config_path: str, out_path: str, tensor_intersection: bool, tensor_union: bool, common: Common
) -> dict[str, Any]:
    """Merge files of tensors of any model, as CONFIG_PATH says, into OUT_PATH (mergekit-pytorch)."""
    if tensor_intersection and tensor_union:
        hint = "give one of -i and -u"
        raise UsageError("KB018", "tensors cannot be both an intersection and a union", hint=hint)
    tensors = "intersection" if tensor_intersection else "union" if tensor_union else "same"
    file = beside(config_path)
    config = documents(config_path)[0].value
    return common.answer(pytorch_text(config, tensors, output(out_path, file), common.settings), file)
