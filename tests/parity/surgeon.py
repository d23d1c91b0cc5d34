"""Transplants tokenizers between pico models with kittybuild and with mergekit-tokensurgeon 0.1.5, and compares rows.

    python -m tests.parity.surgeon --mergekit ENVIRONMENT [--write FILE]

Embedding and head of each model have the same rows here, so that what mergekit does to the other of the two (matches,
weighted means: it swaps them) is compared as well: our embedding with its head, and our head with its embedding. What
counts as equal: computed rows within 2**-20 of the largest number of the table (mergekit computes in float32, we round
once), copied rows too. Not compared are random methods; with `prefix_match` special tokens and `<0x41>`, which are
no texts here and have no beginnings; tokens with `▁`, which mergekit takes for no space here; and bytes whose letter is
another sign, such as `Ċ` for `<0x0A>`, which it does not know.

`stb` and `mp_rope` fail in mergekit for want of a value, which they are given here: `stb` gets its `k`, and `mp_rope`
the `rope_theta` that transformers 5 keeps elsewhere. `landmark_pca` there turns rows by the transpose of the rotation
that it finds, so that signs which a random decomposition gives to axes decide; it is compared where the shared rows of
both tables are equal (`equal rows`), and the rotation is its own transpose. It and `stb` solve in float32 what is not
well conditioned in these tables: their rows are equal to within 2**-13 (`landmark_pca`) and 2**-11 (`stb`).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kittybuild.tokens.matching import Meanings, byte_letters, match
from kittybuild.tokens.vocabulary import Vocabulary
from tests.helpers import load_tensors, run_cli, save_tensors, write_recipe
from tests.parity.command import parser_beside
from tests.parity.parity import call
from tests.surgery import EMBEDDING, HEAD, tokenizers, write

TABLES = (EMBEDDING, HEAD)
NEAR = 2.0**-20
LESS_NEAR = {"landmark_pca": 2.0**-13, "stb": 2.0**-11}
HEAD_LINES = (
    "# Transplanted tokenizers, kittybuild and mergekit-tokensurgeon 0.1.5",
    "",
    "Written by `python -m tests.parity.surgeon`, whose docstring says what counts as equal. Not there: what is random",
    "(`randn`, `john_hewitt`, noise), and `new_vocab_scale` with `mean`, which fails in mergekit.",
    "",
    "| models | options | rows | largest difference | verdict |",
    "|---|---|---|---|---|",
)


REPAIRED = """
import transformers, mergekit.scripts.tokensurgeon as program
transformers.LlamaConfig.rope_theta = property(lambda config: (config.rope_parameters or {}).get("rope_theta", 1e4))
basis = program.compute_token_basis
number = lambda given: getattr(given, "k", given)
program.compute_token_basis = lambda *some, **named: basis(
    *map(number, some), **{name: number(given) for name, given in named.items()}
)
program.main()
"""
ROTARY = {"rope_theta": 500.0, "num_attention_heads": 2}
"""The donor's, other than the model's."""


@dataclass(frozen=True)
class Case:
    """Two models and the options of a stage. `swapped`: mergekit does to one table what we do to the other.
    `equal`: shared tokens have equal rows in both models."""

    model: str
    donor: str
    options: Mapping[str, Any]
    swapped: bool = False
    equal: bool = False

    @property
    def words(self) -> list[str]:
        """The options as mergekit's program takes them."""
        found: list[str] = []
        for key, value in self.options.items():
            name = f"--{key.replace('_', '-')}"
            found += [name] if value is True else [name, str(value)]
        return found


def cases() -> Iterator[Case]:
    """All cases."""
    ways: list[dict[str, Any]] = [{"approximation_method": "mean"}, {"approximation_method": "zero"}]
    ways += [{"approximation_method": "omp", "k": k} for k in (1, 8, 12)]
    ways += [
        {"approximation_method": "common_interpolation", "k": k, "weight_scheme": scheme, **cosine}
        for k in (1, 8)
        for scheme in ("distance_proportional", "barycentric", "least_squares")
        for cosine in ({}, {"cosine_similarity": True})
    ]
    ways += [{"approximation_method": method, "k": k} for method in ("stb", "mp_rope") for k in (1, 8)]
    ways.append({"approximation_method": "omp", "k": 8, "new_vocab_scale": 0.5})
    yield from (Case("one", "two", way) for way in ways)
    yield Case("one", "two", {"approximation_method": "landmark_pca"}, equal=True)
    for method in ("mean", "sum", "weighted_mean"):
        options = {"approximation_method": "subword", "subword_method": method}
        yield Case("one", "two", options, swapped=method == "weighted_mean")
    yield Case("one", "two", {"approximation_method": "subword", "subword_method": "first_last"})
    yield Case("one", "two", {"approximation_method": "mean", "magikarp": True})
    yield Case("one", "two", {"approximation_method": "omp", "k": 8, "magikarp": True})
    for side in ("embed", "lm_head", "yes"):
        yield Case("one", "three", {"approximation_method": "mean", "byte_match": side}, swapped=side != "yes")
        yield Case("one", "two", {"approximation_method": "mean", "prefix_match": side}, swapped=side != "yes")


def run(case: Case, folder: Path, environment: str) -> tuple[int, float, str]:
    """How many rows were compared, the largest difference, and what is wrong."""
    known = {}
    for name in (case.model, case.donor):
        known[name] = write(folder, name, tokenizers()[name], **(ROTARY if name == case.donor else {}))
        tensors = load_tensors(folder / name)
        if case.equal and name == case.donor:
            same = torch.tensor(match(known[case.model], known[case.donor]).same)
            tensors[EMBEDDING][same >= 0] = load_tensors(folder / case.model)[EMBEDDING][same[same >= 0]]
        save_tensors(folder / name / "model.safetensors", {**tensors, HEAD: tensors[EMBEDDING].clone()})
    stage = {"kind": "transplant_tokenizer", "model": case.model, "donor": case.donor, **case.options}
    text = {"kittybuild": 1, "stages": {"out": stage}, "outputs": {"out": {"folder": "ours"}}}
    status, answer = run_cli("build", write_recipe(folder, text), "--store", folder / "store")
    if status:
        return 0, 0.0, str(answer["errors"][0]["message"])
    program = [f"{environment}/bin/mergekit-tokensurgeon"]
    if case.options["approximation_method"] in ("stb", "mp_rope"):
        program = [f"{environment}/bin/python", "-c", REPAIRED]
    call([*program, case.model, case.donor, "theirs", *case.words, "--no-write-model-card", "--quiet"], folder)
    ours, theirs = load_tensors(folder / "ours"), load_tensors(folder / "theirs")
    rows = compared_rows(case, known[case.donor])
    worst, problems = 0.0, []
    near = LESS_NEAR.get(case.options["approximation_method"], NEAR)
    for name in TABLES:
        other = TABLES[1 - TABLES.index(name)] if case.swapped else name
        x, y = ours[name][rows].double(), theirs[other][rows].double()
        apart = (x - y).abs().amax(1) / y.abs().max().clamp(min=1.0)
        worst = max(worst, float(apart.max()))
        odd = [known[case.donor].tokens[row] for row in torch.tensor(rows)[apart > near].tolist()]
        problems += [f"{name}: {len(odd)} rows differ: {odd[:3]}"] if odd else []
    return len(rows), worst, "; ".join(problems)


def compared_rows(case: Case, donor: Vocabulary) -> list[int]:
    """The rows that mean the same to both programs."""
    meanings = Meanings(donor)
    odd = {f"<0x{byte:02X}>" for letter, byte in byte_letters().items() if letter != chr(byte)}
    plain = "prefix_match" in case.options
    return [
        number
        for token, number in donor.ids.items()
        if "▁" not in token and token not in odd and (not plain or meanings.plain(token) is not None)
    ]


def main() -> int:
    """Run all cases, print a line each, return the exit status."""
    arguments = parser_beside(__doc__).parse_args()
    lines, failed = [], False
    for case in cases():
        options = ", ".join(f"{key} {value}" for key, value in case.options.items())
        if not arguments.only.search(options):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows, worst, problem = run(case, Path(folder), arguments.mergekit)
        failed |= bool(problem)
        verdict = problem or ("equal, tables swapped" if case.swapped else "equal")
        options += ", equal rows" if case.equal else ""
        lines.append(f"| {case.model}, {case.donor} | {options} | {rows} | {worst:.1e} | {verdict} |")
        print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join([*HEAD_LINES, *lines]) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
