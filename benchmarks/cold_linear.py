"""A cold linear merge of three 1.1B-parameter bfloat16 siblings: kittybuild against mergekit 0.1.5, in turn.

    python -m benchmarks.cold_linear --mergekit VENV [--rounds 3] [--folder DIR]

VENV is a virtual environment with mergekit==0.1.5; without it only kittybuild runs. Both are whole processes, started
anew each time, that read the same warm files and write a new folder (kittybuild: a new store, too).
"""

from __future__ import annotations

import os

from benchmarks.sides import kittybuild, mergekit, parser, siblings
from benchmarks.timing import in_turn, table


def recipe(paths: list[str]) -> str:
    """The merge, as a mergekit configuration."""
    models = "".join(
        f"  - model: {path}\n    parameters: {{weight: {0.5 - 0.1 * i:.1f}}}\n" for i, path in enumerate(paths)
    )
    return f"merge_method: linear\nmodels:\n{models}dtype: bfloat16\n"


def main() -> None:
    """Make the models once, run both tools in turn, print the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--small", action="store_true", help="54M parameters instead of 1.1B")
    options = arguments.parse_args()
    paths = siblings(options.folder, 3, large=not options.small)
    config = os.path.join(options.folder, "linear.yml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(recipe(paths))
    out, store = os.path.join(options.folder, "out"), os.path.join(options.folder, "store")

    commands = {"kittybuild": kittybuild(config, out, store)}
    if options.mergekit:
        commands = {"mergekit 0.1.5": mergekit(options.mergekit, "mergekit-yaml", config, out, out=out), **commands}
    results = in_turn(commands, options.rounds, paths)
    print(table(results, next(iter(results))))


if __name__ == "__main__":
    main()
