"""Every merge method on three siblings: kittybuild against mergekit 0.1.5, in turn.

    python -m benchmarks.methods --mergekit VENV [--rounds 3] [--folder DIR] [--large] [--only ties,della]

VENV is a virtual environment with mergekit==0.1.5; without it only kittybuild runs. Both are whole processes, started
anew each time, that read the same warm files and write a new folder (kittybuild: a new store, too). The siblings have
54M parameters in bfloat16, with --large 1.1B. Methods of mergekitty alone are measured without a peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.sides import kittybuild, mergekit, parser, siblings
from benchmarks.timing import Run, in_turn
from kittybuild.builders.registry import BUILTIN
from kittybuild.model.method import Method

ONLY_OURS = ("consensus_ta", "consensus_ties")
VALUES: Mapping[str, Any] = {"weight": 0.4, "density": 0.5, "t": 0.4, "gamma": 0.01, "scale": 0.7, "epsilon": 0.1}
GOALS: Mapping[str, float] = {"ties": 6.0, "dare_ties": 4.0, "dare_linear": 4.0, "della": 4.0, "della_linear": 4.0}
GOAL = 3.0


def config(method: Method, paths: Sequence[str]) -> dict[str, Any]:
    """A mergekit configuration of a method over the siblings, as many as it takes."""
    based = method.base != "ordinary"
    most = method.most if method.most is not None else len(paths)
    others = paths[1 : 1 + most] if based else paths[:most]
    given = {param.name for param in method.params if param.required or param.name in ("weight", "density")}
    per_model = {p.name: VALUES[p.name] for p in method.params if p.name in given and p.scope == "input"}
    shared = {p.name: VALUES[p.name] for p in method.params if p.name in given and p.scope == "shared"}
    if method.name == "slerp":  # whose base is one of the two
        others, per_model, shared = paths[:2], {}, {"t": VALUES["t"]}
    if method.name == "passthrough":
        per_model = {"scale": VALUES["scale"]}
    form: dict[str, Any] = {"merge_method": method.name, "dtype": "bfloat16"}
    if based:
        form["base_model"] = paths[0]
    models = [{"model": path, **({"parameters": per_model} if per_model else {})} for path in others]
    return {**form, "models": models, **({"parameters": shared} if shared else {})}


def measured(method: Method, paths: Sequence[str], options: argparse.Namespace) -> dict[str, list[Run]]:
    """The runs of both tools."""
    out, store = os.path.join(options.folder, "out"), os.path.join(options.folder, "store")
    text = os.path.join(options.folder, f"{method.name}.yml")
    with open(text, "w", encoding="utf-8") as file:
        json.dump(config(method, paths), file)

    commands = {"kittybuild": kittybuild(text, out, store)}
    if options.mergekit and method.name not in ONLY_OURS:
        commands = {"mergekit": mergekit(options.mergekit, "mergekit-yaml", text, out, out=out), **commands}
    return in_turn(commands, options.rounds, paths)


def rows(methods: Sequence[Method], paths: Sequence[str], options: argparse.Namespace) -> Iterator[str]:
    """A Markdown table, a row for each method: medians."""
    yield "| method | mergekit s | kittybuild s | times faster | goal | kittybuild peak MB |"
    yield "|---|---|---|---|---|---|"
    for method in methods:
        print(method.name, file=sys.stderr)
        runs = measured(method, paths, options)
        walls = {name: statistics.median(each.wall for each in several) for name, several in runs.items()}
        peak = max(each.peak for each in runs["kittybuild"]) / 1e6
        peer = f"{walls['mergekit']:.1f}" if "mergekit" in walls else "-"
        ratio = f"{walls['mergekit'] / walls['kittybuild']:.1f}" if "mergekit" in walls else "-"
        goal = GOALS.get(method.name, GOAL)
        yield f"| {method.name} | {peer} | {walls['kittybuild']:.2f} | {ratio} | {goal:g} | {peak:.0f} |"


def main() -> None:
    """Make the siblings once, run the methods one after the other, print the table row by row."""
    arguments = parser(__doc__)
    arguments.add_argument("--large", action="store_true", help="1.1B parameters instead of 54M")
    arguments.add_argument("--only", help="names of methods, with commas between")
    options = arguments.parse_args()
    paths = siblings(options.folder, 3, large=options.large)
    wanted = options.only.split(",") if options.only else [method.name for method in BUILTIN.methods()]
    for row in rows([method for method in BUILTIN.methods() if method.name in wanted], paths, options):
        print(row, flush=True)


if __name__ == "__main__":
    main()
