"""`kittybuild merge-lora`: what mergekitty-merge-lora does."""

from __future__ import annotations

from typing import Any

import click

from kittybuild.cli.programs import Common, here, program
from kittybuild.recipe.programs import apply_lora_text


@program("merge-lora")
@click.argument("base")
@click.argument("adapter")
@click.argument("out_path", type=click.Path())
def command(base: str, adapter: str, out_path: str, common: Common) -> dict[str, Any]:
    """Add the LoRA ADAPTER to the model BASE, into OUT_PATH (mergekitty-merge-lora)."""
    return common.answer(apply_lora_text(base, adapter, out_path, common.settings), here(out_path))
