"""`kittybuild reproduce` on folders that mergekit 0.1.5 writes of rxnfp's real models: a table of what came out.

python -m tests.parity.reproduce --mergekit ENVIRONMENT [--write FILE]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tests.helpers import load_tensors, run_cli, save_tensors
from tests.parity.command import parser_beside
from tests.parity.real import write_real

RECIPES = {
    "linear": """\
        merge_method: linear
        models:
          - {model: ./models/base-float32, parameters: {weight: 0.4}}
          - {model: ./models/ft-float32, parameters: {weight: [0.2, 0.8]}}
          - {model: ./models/classifier-float32, parameters: {weight: 0.3}}
        """,
    "ties": """\
        merge_method: ties
        base_model: ./models/base-float32
        models:
          - {model: ./models/ft-float32, parameters: {weight: 0.6, density: 0.7}}
          - {model: ./models/classifier-float32, parameters: {weight: 0.5, density: 0.3}}
        parameters: {normalize: true}
        """,
    "slerp": """\
        merge_method: slerp
        base_model: ./models/base-float32
        models: [{model: ./models/base-float32}, {model: ./models/ft-float32}]
        parameters: {t: [0.1, 0.6]}
        """,
}
DTYPES = ("float32", "bfloat16")
UNKNOWN = "cls.predictions.transform."  # mergekit's BERT does not name them: it leaves them out without a word
EDITED = "bert.encoder.layer.3.attention.self.query.weight"


def published(mergekit: str, place: Path, only: re.Pattern[str]) -> Iterator[tuple[str, Path]]:
    """What mergekit makes of each recipe in each dtype, one thread, in shards, so that its index says the version."""
    write_real(place / "models")
    for file in (place / "models").glob("*/model.safetensors"):
        tensors = load_tensors(file.parent)
        save_tensors(file, {name: tensor for name, tensor in tensors.items() if not name.startswith(UNKNOWN)})
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name, text in RECIPES.items():
        for dtype in DTYPES:
            if not only.search(f"{name}, {dtype}"):
                continue
            recipe, out = place / f"{name}-{dtype}.yml", place / f"{name}-{dtype}"
            recipe.write_text(f"{textwrap.dedent(text)}dtype: {dtype}\n", encoding="utf-8")
            command = [f"{mergekit}/bin/mergekit-yaml", str(recipe), str(out), "--no-copy-tokenizer"]
            subprocess.run(
                [*command, "--out-shard-size", "10M"], cwd=place, env=environ, check=True, capture_output=True
            )
            yield f"{name}, {dtype}", out


def reproduced(folder: Path) -> tuple[int, dict[str, Any]]:
    """Exit status and document, everything computed."""
    return run_cli("reproduce", folder, "--store", folder.parent / "store", "--fresh")


def edit(folder: Path) -> None:
    """Move one element of EDITED by one unit in the last place."""
    import torch
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if EDITED in tensors:
            bits = torch.int32 if tensors[EDITED].dtype is torch.float32 else torch.int16
            tensors[EDITED].view(bits)[7, 7] += 1
            save_tensors(file, tensors)
            return
    raise AssertionError(f"{folder} has no {EDITED}")


def row(name: str, folder: Path) -> tuple[str, bool]:
    """A line of the table, and whether all is as it should be."""
    tensors = load_tensors(folder)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    status, found = reproduced(folder)
    edit(folder)
    edited, then = reproduced(folder)
    named = [one["tensor"] for one in then["differences"]]
    same = found["tensors"]["identical"]
    good = (status, same, edited, named) == (0, len(tensors), 6, [EDITED])
    cells = [name, f"{len(tensors)}", f"{numbers:,}", f"{same}", f"{status}", f"{edited}", f"`{', '.join(named)}`"]
    return f"| {' | '.join(cells)} |", good


def main() -> int:
    """Print the table, or write it; the exit status is 1 if a line is not as it should be."""
    options = parser_beside(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as place:
        here = os.getcwd()
        os.chdir(place)
        rows = [row(name, folder) for name, folder in published(options.mergekit, Path(place), options.only)]
        os.chdir(here)
    text = (
        "# Published merges, built again\n\n"
        "`make parity` writes this file. mergekit 0.1.5 merged the models of rxnfp 0.1.0 (without the four tensors\n"
        f"`{UNKNOWN}*`, which it would leave out); `kittybuild reproduce` built each again from the\n"
        "`mergekit_config.yml` inside it. Then one element of one tensor was moved by one unit in the last place.\n\n"
        "| merge | tensors | numbers | bit-identical | exit status | after the edit | named |\n"
        "|---|---|---|---|---|---|---|\n" + "".join(f"{line}\n" for line, _ in rows)
    )
    if options.write:
        options.write.write_text(text, encoding="utf-8")
    click.echo(text)
    return 0 if all(good for _, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
