"""What a small change costs: a cold merge of 54M-parameter siblings, a change in one layer, and nothing to do.

    python -m benchmarks.incremental [--folder DIR]

Prints tensors computed and seconds of each whole process, and the same change built cold in another store.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from benchmarks.siblings import LLAMA_54M, make_siblings

BEFORE = "[{filter: layers.5., value: 0.5}, {value: 0.5}]"
AFTER = "[{filter: layers.5., value: 0.9}, {value: 0.5}]"


def recipe(paths: list[str], weight: str) -> str:
    """TIES of two siblings on the first."""
    models = f"  - {{model: {paths[1]}, parameters: {{density: 0.5, weight: {weight}}}}}\n"
    models += f"  - {{model: {paths[2]}, parameters: {{density: 0.5, weight: 0.5}}}}\n"
    return f"merge_method: ties\nbase_model: {paths[0]}\nmodels:\n{models}dtype: bfloat16\n"


def build(config: str, folder: str, store: str) -> dict[str, Any]:
    """One build, as a whole process, with its seconds from outside."""
    import time

    command = [sys.executable, "-m", "kittybuild", "build", config, "-o", folder, "--store", store, "--json"]
    started = time.monotonic()
    report: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {**report, "wall": time.monotonic() - started}


def main() -> None:
    """Four builds and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "kittybuild-bench"))
    folder = parser.parse_args().folder
    with ProcessPoolExecutor(1) as maker:
        paths = maker.submit(make_siblings, os.path.join(folder, "54m"), LLAMA_54M, 3).result()
    for name in ("out", "store", "out-cold", "store-cold"):
        shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
    config = os.path.join(folder, "ties.yml")
    runs = {}
    for name, weight, where in (
        ("cold", BEFORE, ""),
        ("one layer changed", AFTER, ""),
        ("nothing changed", AFTER, ""),
        ("the change, cold", AFTER, "-cold"),
    ):
        with open(config, "w", encoding="utf-8") as file:
            file.write(recipe(paths, weight))
        runs[name] = build(config, os.path.join(folder, "out" + where), os.path.join(folder, "store" + where))
    print("| build | tensors computed | of | seconds | peak MB | manifest |\n|---|---|---|---|---|---|")
    for name, run in runs.items():
        stage = run["stages"]["merge"]
        row = [name, stage["computed"], stage["tensors"], f"{run['wall']:.2f}", f"{run['peak_rss'] / 1e6:.0f}"]
        print("| " + " | ".join(map(str, [*row, stage["manifest"][:12]])) + " |")


if __name__ == "__main__":
    main()
