"""What is compared: kittybuild and mergekit 0.1.5, whole processes with the same models and nothing of their own."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from benchmarks.siblings import LLAMA_1B, LLAMA_54M, make_siblings
from benchmarks.timing import Run, run

Side = Callable[[], Run]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all comparisons have; a script may add its own."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--mergekit", metavar="VENV", help="a virtual environment with mergekit==0.1.5")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "kittybuild-bench"))
    return found


def siblings(folder: str, count: int, *, large: bool) -> list[str]:
    """The folders of so many siblings of 1.1B (`large`) or 54M parameters, made where they are not there yet."""
    shape, size = (LLAMA_1B, "1b") if large else (LLAMA_54M, "54m")
    with ProcessPoolExecutor(1) as maker:  # a child's peak memory counts from its parent's: stay small
        return maker.submit(make_siblings, os.path.join(folder, size), shape, count).result()


def kittybuild(config: str, out: str, store: str) -> Side:
    """A build of a recipe from nothing: without output, and with an empty store."""

    def once() -> Run:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(store, ignore_errors=True)
        return run([sys.executable, "-m", "kittybuild", "build", config, "-o", out, "--store", store, "--json"])

    return once


def mergekit(venv: str, program: str, *args: str, out: str) -> Side:
    """A program of mergekit's, without output."""

    def once() -> Run:
        shutil.rmtree(out, ignore_errors=True)
        return run([os.path.join(venv, "bin", program), *args, "--quiet"])

    return once
