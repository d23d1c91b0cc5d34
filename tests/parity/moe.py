"""Routers of mixtures beside mergekit-moe's: the largest difference of a row's element, for each family and gate mode.

python -m tests.parity.moe --mergekit ENVIRONMENT [--write FILE]
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.building import build
from tests.helpers import load_tensors, write_json, write_recipe
from tests.mixtures import mixture, pico
from tests.parity.command import parser_beside

MODES = ("hidden", "hidden_avg", "cheap_embed")
FAMILIES = (("mixtral", "llama", 0), ("deepseek", "llama", 1), ("qwen moe", "qwen2", 1), ("qwen3 moe", "qwen3", 0))
BOUND = 1e-5
HEAD = (
    "# Mixtures of experts beside mergekit-moe 0.1.5",
    "",
    "Pico models in float32, two experts, prompts of unequal lengths, negative prompts; made by",
    "`python -m tests.parity.moe`. A difference is the largest of any element of any router's row (rows are of",
    "length 1); all other tensors, counted in the last column, are the same bits.",
    "",
    "| family | base | gate mode | difference | equal tensors |",
    "|---|---|---|---|---|",
)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB = 320


def write_bytes_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer as Qwen's, whose class transformers takes for its model types, whatever a file says."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 3, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator([f"w{number} w{number + 1}" for number in range(50)], trainer)
    made.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>"}
    write_json(folder / "tokenizer_config.json", {**roles, "tokenizer_class": "Qwen2Tokenizer"})


def difference(peer: str, folder: Path, family: str, model_type: str, shared: int, mode: str) -> tuple[float, int]:
    """The largest difference, and how many tensors beside the routers are the same bits. Raises where one is not."""
    models = [pico(folder / f"model{seed}", model_type, seed, vocab_size=VOCAB) for seed in range(3)]
    for model in models if model_type.startswith("qwen") else ():
        write_bytes_tokenizer(model)
    prompts = {} if family == "deepseek" else {"positive_prompts": ["w3 w4", "w5"]}
    beside = [{"source_model": str(models[1]), **prompts}] * shared
    more: dict[str, Any] = {"shared_experts": beside} if shared else {}
    recipe = mixture(models[0], models[1:], gate_mode=mode, architecture=family, dtype="float32", **more)
    recipe["experts"][0]["negative_prompts"] = ["w40 w41", "w42"]
    text = write_recipe(folder, recipe, "peer.yml")
    subprocess.run([peer, text, str(folder / "peer")], check=True, capture_output=True)
    layout = "split" if any(".experts.0." in name for name in load_tensors(folder / "peer")) else "fused"
    ours = write_recipe(folder, {**recipe, "layout": layout}, "ours.yml")
    build(ours, "-o", folder / "ours", "--store", folder / "store")
    made, theirs = load_tensors(folder / "ours"), load_tensors(folder / "peer")
    routers = [name for name in theirs if name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))]
    assert made.keys() == theirs.keys(), sorted(made.keys() ^ theirs.keys())[:4]
    wrong = [name for name in theirs if name not in routers and not made[name].equal(theirs[name])]
    assert not wrong, wrong[:4]
    return max(float((made[name] - theirs[name]).abs().max()) for name in routers), len(theirs) - len(routers)


def lines(peer: str, only: re.Pattern[str]) -> Iterator[str]:
    """A row of the table for each case. Raises AssertionError where a case is not as it should be."""
    for family, model_type, shared in FAMILIES:
        for mode in MODES:
            if not only.search(f"{family}, {mode}"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                found, equal = difference(peer, Path(folder), family, model_type, shared, mode)
            assert found < BOUND, (family, mode, found)
            yield f"| {family} | {model_type} | {mode} | {found:.1e} | {equal} |"


def main() -> None:
    """Run all cases, and print a line for each."""
    arguments = parser_beside(__doc__).parse_args()
    table = list(HEAD)
    for line in lines(f"{arguments.mergekit}/bin/mergekit-moe", arguments.only):
        print(line, flush=True)
        table.append(line)
    if arguments.write:
        arguments.write.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
