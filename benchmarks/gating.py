"""What gating by the hidden states of a base of 7B dimensions takes: the routers of a mixture, and nothing else, built.

    python -m benchmarks.gating [--layers 32] [--memory 4GB] [--jobs 2] [--folder DIR]

The base is one sparse file: its norms, the first rows of each matrix and the embeddings of the prompts' tokens are
numbers, the rest are holes, which read as zeros and take no disk. Only the hidden states of every layer and the rows of
the routers are made and written: experts are renamed, and would only be copied. Peak memory is that of the build's
process with all its workers, in proportional shares.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from dataclasses import replace
from typing import Any

from benchmarks.siblings import Shape, config, tensor_shapes
from benchmarks.timing import run as timed

LLAMA_7B = Shape(layers=32, width=4096, inner=11_008, heads=32, kv_heads=32, vocab=32_000)
WORDS, ROWS, PROMPTS, TOKENS = 256, 64, 4, 48


def make_base(folder: str, shape: Shape) -> str:
    """The sparse model, with a tokenizer of a few words; what is there already is kept."""
    path = os.path.join(folder, "base")
    if not os.path.exists(os.path.join(path, "config.json")):
        os.makedirs(path, exist_ok=True)
        _write_weights(os.path.join(path, "model.safetensors"), tensor_shapes(shape))
        _write_json(path, "tokenizer.json", _tokenizer())
        _write_json(path, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
        _write_json(path, "config.json", config(shape, positions=4096))
    return path


def _write_weights(path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    import ml_dtypes
    import numpy as np

    header: dict[str, Any] = {}
    end = 0
    for name, sides in shapes.items():
        header[name] = {"dtype": "BF16", "shape": sides, "data_offsets": [end, end + 2 * math.prod(sides)]}
        end += 2 * math.prod(sides)
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for seed, (name, sides) in enumerate(shapes.items()):
            rows = 1 if len(sides) == 1 else WORDS if "embed" in name else ROWS
            drawn: Any = np.random.Generator(np.random.Philox(seed)).standard_normal((rows, sides[-1]), np.float32)
            drawn = 1 + drawn / 10 if len(sides) == 1 else drawn / math.sqrt(sides[-1])
            file.seek(start + header[name]["data_offsets"][0])
            file.write(drawn.astype(ml_dtypes.bfloat16).tobytes())


def _tokenizer() -> dict[str, Any]:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{number}" for number in range(3, WORDS))]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    made.add_special_tokens(words[:3])
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found: dict[str, Any] = json.loads(made.to_str())
    return found


def _write_json(folder: str, name: str, value: Any) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file)


def recipe(base: str) -> str:
    """Two experts, each with prompts of its own; both are the base, whose weights they only rename."""

    def prompts(expert: int) -> list[str]:
        numbers = [[3 + (7 * expert + 13 * p + 5 * t) % (WORDS - 3) for t in range(TOKENS - p)] for p in range(PROMPTS)]
        return [" ".join(f"w{number}" for number in prompt) for prompt in numbers]

    experts = [{"source_model": base, "positive_prompts": prompts(expert)} for expert in range(2)]
    stage = {"kind": "moe", "base_model": base, "gate_mode": "hidden", "architecture": "mixtral", "experts": experts}
    return json.dumps({"kittybuild": 1, "stages": {"team": stage}})


def build_routers(text: str, folder: str, memory: int, jobs: int) -> dict[str, Any]:
    """The routers of the one stage of a recipe, in a new store: how many rows of how many layers differ."""
    from safetensors.torch import load_file

    from kittybuild import api
    from kittybuild.api.planning import looked_up
    from kittybuild.builders.plugins import load
    from kittybuild.executor.events import Silent
    from kittybuild.executor.run import Limits, run
    from kittybuild.model.derivation import Derivation
    from kittybuild.planner.lower import only
    from kittybuild.store.store import Store

    builders = load(())
    prepared = api.prepare(api.recipe_of(text, os.path.join(folder, "team.yml"), builders), builders=builders)
    with Store.open(os.path.join(folder, "store-gating")) as store:
        known = api.plan(prepared, store, builders)
        stage = known.plan.stages["team"]
        drvs = {name: step for name, step in stage.steps.items() if isinstance(step, Derivation)}
        rows = {name: step for name, step in drvs.items() if step.builder == "router_states"}
        plan = replace(known.plan, stages={**known.plan.stages, "team": replace(stage, steps=rows)})
        known = looked_up(only(plan, ("team",)), known.sources, store, None)
        results, amounts = run(known, store, builders, Limits(memory, jobs), Silent())
        (shard,) = results["team"].shards
        path = store.pack(shard.pack)
        assert path is not None
        routers = load_file(path)
    different = {tuple(row.float().tolist()) for router in routers.values() for row in router}
    assert all(router.isfinite().all() for router in routers.values())
    return {"routers": len(routers), "different rows": len(different), "read GB": round(amounts.read / 1e9, 2)}


def main() -> None:
    """Write the base, build the routers in a process of its own, print what that took."""
    from kittybuild.recipe.parse import parse_size

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA_7B.layers)
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", default=os.path.join(tempfile.gettempdir(), "kittybuild-bench"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = os.path.join(options.folder, f"7b-{options.layers}")
    if options.inside:
        text = recipe(os.path.join(folder, "base"))
        _write_json(folder, "routers.json", build_routers(text, folder, parse_size(options.memory), options.jobs))
        return
    base = make_base(folder, replace(LLAMA_7B, layers=options.layers))
    shutil.rmtree(os.path.join(folder, "store-gating"), ignore_errors=True)
    size = os.stat(os.path.join(base, "model.safetensors"))
    print(f"base: {size.st_size / 1e9:.1f} GB, {size.st_blocks * 512 / 1e9:.2f} GB of them on the disk")
    found = timed([sys.executable, "-m", "benchmarks.gating", *sys.argv[1:], "--inside"])
    with open(os.path.join(folder, "routers.json"), encoding="utf-8") as file:
        print(json.load(file))
    print(f"routers: {found.wall:.1f} s, {found.cpu:.1f} CPU s, peak {found.peak / 1e9:.2f} GB of {options.memory}")


if __name__ == "__main__":
    main()
