"""The words that the programs here have in common: the peer, a part of the cases, a file for the table."""

from __future__ import annotations

import argparse
import re
from pathlib import Path


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """`--only` is a pattern; `--write` writes what was run, so that a table of all cases needs a run of all."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--only", type=re.compile, default="", metavar="PATTERN", help="only cases whose name has this")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table to this file, too")
    return parser


def environment_at(text: str) -> str:
    """A peer's environment, from whatever folder its programs are started. Its links are what makes it one."""
    return str(Path(text).absolute())


def parser_beside(doc: str | None) -> argparse.ArgumentParser:
    """The same for a program that runs mergekit 0.1.5 alone."""
    parser = parser_of(doc)
    help_ = "the environment with mergekit==0.1.5"
    parser.add_argument("--mergekit", type=environment_at, required=True, metavar="DIR", help=help_)
    return parser
