"""Runs merges with a peer, in the peer's own environment: configurations as JSON lines on standard input.

For each line `{"config": ..., "out": folder}` a line `{"error": text or null}` goes into the file that is named first.
"""

from __future__ import annotations

import json
import sys
from typing import Any

try:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
except ImportError:
    from mergekitty.config import MergeConfiguration
    from mergekitty.merge import run_merge
    from mergekitty.options import MergeOptions


def merge(config: dict[str, Any], out: str) -> str | None:
    """The error that a merge ends with, if it does."""
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    try:
        run_merge(MergeConfiguration.model_validate(config), out, options=options)
    except Exception as error:  # whatever a peer raises is a result
        return f"{type(error).__name__}: {error}"
    return None


def main() -> None:
    """One answer a line."""
    with open(sys.argv[1], "w", encoding="utf-8") as answers:
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps({"error": merge(order["config"], order["out"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
