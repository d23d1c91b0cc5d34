"""Merges as mergekit 0.1.5 itself published them, small enough to be kept, and the models that they are of.

The folders beside this file are its own. An environment of that version (tests/parity/peers) writes them anew:
python -m tests.golden.published.cases .../bin/mergekit-yaml
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers import pico_llama

HERE = Path(__file__).parent
NAMES = ("base", "happy", "zen")

# Names of three parts: those of two mergekit would look for on the Hub. The tests say where the models are.
RECIPES = {
    "linear": """\
        merge_method: linear
        models:
          - model: sources/pico/base
            parameters: {weight: 0.2}
          - model: sources/pico/happy
            parameters: {weight: [0.3, 0.7]}
          - model: sources/pico/zen
            parameters:
              weight:
                - {filter: mlp, value: 0.9}
                - value: 0.35
        dtype: bfloat16
        """,
    "ties": """\
        merge_method: ties
        base_model: sources/pico/base
        models:
          - model: sources/pico/happy
            parameters: {weight: 0.6, density: 0.7}
          - model: sources/pico/zen
            parameters: {weight: 0.45, density: 0.4}
        parameters: {normalize: true}
        dtype: bfloat16
        """,
    "slerp": """\
        merge_method: slerp
        base_model: sources/pico/base
        slices:
          - sources:
              - {model: sources/pico/base, layer_range: [0, 2]}
              - {model: sources/pico/happy, layer_range: [0, 2]}
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5]}
            - value: 0.37
        dtype: bfloat16
        """,
}
SHARDED = ("ties",)  # of several files, so with an index, in which the version stands


def write_models(folder: Path) -> dict[str, Path]:
    """The models, by the names that the recipes give them."""
    base = pico_llama(folder / "base", 61, width=16, vocab=32)
    for seed, name in enumerate(NAMES[1:], 62):
        pico_llama(folder / name, seed, base=base)
    return {f"sources/pico/{name}": folder / name for name in NAMES}


def _write(program: str) -> None:
    import textwrap

    with tempfile.TemporaryDirectory() as place:
        write_models(Path(place) / "sources/pico")
        for name, text in RECIPES.items():
            recipe, out = Path(place) / f"{name}.yml", HERE / name
            recipe.write_text(textwrap.dedent(text), encoding="utf-8")
            shutil.rmtree(out, ignore_errors=True)
            size = ["--out-shard-size", "8K"] if name in SHARDED else []
            command = [program, str(recipe), str(out), "--no-copy-tokenizer", "--no-cuda", *size]
            subprocess.run(command, cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)


if __name__ == "__main__":
    _write(sys.argv[1])
