"""An adapter of rank 32 extracted from a bfloat16 sibling: kittybuild against mergekit 0.1.5, in turn.

    python -m benchmarks.extract [--mergekit VENV] [--rounds 3] [--folder DIR] [--large]

VENV is a virtual environment with mergekit==0.1.5 (which computes all singular values); without it only kittybuild
runs: with both of its solvers, or with --large (1.1B parameters instead of 54M) with the randomized one. Whole
processes that read the same warm files; kittybuild begins with a new store. The siblings differ by noise, whose
singular values are nearly equal: the hardest case for a randomized method. Embeddings, head and norms are left out.
Behind the table: the share of the differences that each adapter keeps, by its factors themselves.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor

from benchmarks.sides import kittybuild, mergekit, parser, siblings
from benchmarks.timing import in_turn, table

RANK = 32
RECIPE = """\
kittybuild: 1
stages:
  delta:
    kind: extract_lora
    model: {tuned}
    base: {base}
    rank: {rank}
    svd: {svd}
    include: [self_attn, mlp]
    out_dtype: bfloat16
"""


def kept(base: str, tuned: str, adapter: str) -> float:
    """The share of the squared differences of all modules that an adapter keeps, by its factors themselves."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    factors = load_file(os.path.join(adapter, "adapter_model.safetensors"))
    total = rest = 0.0
    with (
        safe_open(os.path.join(base, "model.safetensors"), "pt") as one,
        safe_open(os.path.join(tuned, "model.safetensors"), "pt") as two,
    ):
        for name in factors:
            module, found, _ = name.removeprefix("base_model.model.").partition(".lora_A.weight")
            if found:
                delta = two.get_tensor(f"{module}.weight").float() - one.get_tensor(f"{module}.weight").float()
                b = factors[name.replace("lora_A", "lora_B")].float()
                total += float((delta**2).sum())
                rest += float(((delta - b @ factors[name].float()) ** 2).sum())
    return 1 - rest / total


def main() -> None:
    """Make the models once, run the tools in turn, print the tables."""
    arguments = parser(__doc__)
    arguments.add_argument("--large", action="store_true", help="1.1B parameters instead of 54M")
    options = arguments.parse_args()
    base, tuned = siblings(options.folder, 2, large=options.large)
    solvers = ["randomized"] if options.large else ["exact", "randomized"]
    outs = {name: os.path.join(options.folder, f"extracted-{name}") for name in ("mergekit", *solvers)}
    commands = {}
    if options.mergekit:
        models = ["--model", tuned, "--base-model", base, "--out-path", outs["mergekit"], "--max-rank", str(RANK)]
        rest = ["-e", "embed_tokens", "-e", "lm_head", "--skip-undecomposable"]
        tool = mergekit(options.mergekit, "mergekit-extract-lora", *models, *rest, out=outs["mergekit"])
        commands["mergekit"] = tool
    for svd in solvers:
        config, store = os.path.join(options.folder, f"{svd}.yml"), os.path.join(options.folder, "store-extract")
        with open(config, "w", encoding="utf-8") as file:
            file.write(RECIPE.format(tuned=tuned, base=base, rank=RANK, svd=svd))
        commands[svd] = kittybuild(config, outs[svd], store)
    results = in_turn(commands, options.rounds, [base, tuned])
    print(table(results, next(iter(results))))
    with ProcessPoolExecutor(1) as judge:
        shares = {name: judge.submit(kept, base, tuned, outs[name]).result() for name in results}
    print(json.dumps({"kept energy": shares}, indent=1))


if __name__ == "__main__":
    main()
