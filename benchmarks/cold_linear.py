"""A cold linear merge of three 1.1B-parameter bfloat16 siblings: kittybuild against mergekit 0.1.5, in turn.

    python -m benchmarks.cold_linear --mergekit VENV [--rounds 3] [--folder DIR]

VENV is a virtual environment with mergekit==0.1.5; without it only kittybuild runs. Both are whole processes, started
anew each time, that read the same warm files and write a new folder (kittybuild: a new store, too).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor

from benchmarks.siblings import LLAMA_1B, LLAMA_54M, make_siblings
from benchmarks.timing import Run, in_turn, run, table


def recipe(paths: list[str]) -> str:
    """The merge, as a mergekit configuration."""
    models = "".join(
        f"  - model: {path}\n    parameters: {{weight: {0.5 - 0.1 * i:.1f}}}\n" for i, path in enumerate(paths)
    )
    return f"merge_method: linear\nmodels:\n{models}dtype: bfloat16\n"


def main() -> None:
    """Make the models once, run both tools in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", metavar="VENV", help="a virtual environment with mergekit==0.1.5")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "kittybuild-bench"))
    parser.add_argument("--small", action="store_true", help="54M parameters instead of 1.1B")
    options = parser.parse_args()
    shape = LLAMA_54M if options.small else LLAMA_1B
    with ProcessPoolExecutor(1) as maker:  # a child's peak memory counts from its parent's: stay small
        paths = maker.submit(
            make_siblings, os.path.join(options.folder, "54m" if options.small else "1b"), shape, 3
        ).result()
    config = os.path.join(options.folder, "linear.yml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(recipe(paths))
    out, store = os.path.join(options.folder, "out"), os.path.join(options.folder, "store")

    def kittybuild() -> Run:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
        return run([sys.executable, "-m", "kittybuild", "build", config, "-o", out, "--store", store, "--json"])

    def mergekit() -> Run:
        shutil.rmtree(out, ignore_errors=True)
        return run([os.path.join(options.mergekit, "bin", "mergekit-yaml"), config, out, "--quiet"])

    commands = {"mergekit 0.1.5": mergekit} if options.mergekit else {}
    results = in_turn({**commands, "kittybuild": kittybuild}, options.rounds, paths)
    print(table(results, next(iter(results))))


if __name__ == "__main__":
    main()
