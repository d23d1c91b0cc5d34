"""Each of mergekit's programs and ours of that name, whole commands in one folder: the same tensors.

    python -m tests.parity.programs --mergekit ENVIRONMENT [--mergekitty ENVIRONMENT] [--write FILE]

What counts as equal:

- bits: names, shapes, dtypes and bytes of all tensors, with `--numerics mergekit-0.1.5` where there is arithmetic;
- near: the same names and shapes, elements within 2**-20 of the largest of the tensor (float32 here, rounded once);
- adapter: the same modules with the same ranks, and B A of each within 2**-16 of its largest element; the tensors that
  are saved whole have the same bits, and those that only the peer saves are the base's own. (Singular vectors have two
  signs.) What an adapter says of itself is compared too: its rank, patterns, and what it adds to;
- structure: which layers are drawn is random, so: the same names, and each layer is the layer of that number of one of
  the models, bit for bit.

Not here: the layershuffle of mergekit 0.1.5 and its `--save-module` beside embeddings that are saved, which end with an
error (mergekitty's layershuffle takes the place of the first, where its environment is given), and mergekitty's
extract-lora, which wants a GPU's library. Where an argument is a folder, the peer gets its whole path: it would ask the
Hub for `base`.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import load_tensors, noise, pico_adapter, pico_llama, save_tensors, write_recipe, write_tokenizer
from tests.mixtures import pico
from tests.parity.command import environment_at, parser_beside
from tests.parity.parity import call
from tests.surgery import EMBEDDING, HEAD, tokenizers, write

LAYERS = 4
HEAD_LINES = (
    "# Programs of mergekit and ours, as whole commands",
    "",
    "Written by `python -m tests.parity.programs`, whose docstring says what `bits`, `near`, `adapter` and `structure`",
    "mean. The same words behind both programs, but that ours are told `--numerics mergekit-0.1.5` for `bits`.",
    "",
    "| command | peer | tensors | compared by | verdict |",
    "|---|---|---:|---|---|",
)
CONFIGS = {
    "ties.yml": """
        merge_method: ties
        base_model: base
        models: [{model: a, parameters: {weight: 0.5, density: 0.6}}, {model: b, parameters: {weight: [0.2, 0.9]}}]
        parameters: {density: 0.4, normalize: true}
    """,
    "slices.yml": """
        merge_method: passthrough
        slices:
          - sources: [{model: a, layer_range: [0, 3]}]
          - sources: [{model: b, layer_range: [1, 4]}]
    """,
    "multi.yml": """
        name: soup
        merge_method: linear
        models: [{model: a, parameters: {weight: 0.7}}, {model: b, parameters: {weight: 0.5}}]
        ---
        name: lerp
        merge_method: slerp
        base_model: base
        models: [{model: soup}]
        parameters: {t: [0.2, 0.8]}
        ---
        merge_method: task_arithmetic
        base_model: base
        models: [{model: soup, parameters: {weight: 0.3}}, {model: lerp, parameters: {weight: -0.6}}]
    """,
    "files.yml": """
        merge_method: task_arithmetic
        base_model: x.safetensors
        models: [{model: y.safetensors, parameters: {weight: 0.4}}, {model: z.safetensors, parameters: {weight: 0.7}}]
    """,
    "moe.yml": """
        base_model: m0
        gate_mode: hidden
        architecture: mixtral
        experts_per_token: 2
        dtype: float32
        layout: fused
        experts:
          - {source_model: m1, positive_prompts: ["w3 w4", "w5 w6 w7"], negative_prompts: ["w40"]}
          - {source_model: m2, positive_prompts: ["w20 w22", "w24"]}
    """,
}


@dataclass(frozen=True)
class Case:
    """One command: `words` are all behind the program's name, the same for the peer's.

    `judge` says what differs between what lies in a folder of both, for each of `folders`. `peer`: whose program it is.
    """

    program: str
    words: tuple[str, ...]
    judge: Callable[[Path, Path], str]
    counts: str
    folders: tuple[str, ...] = ("out",)
    peer: str = "mergekit"
    exact: bool = True

    @property
    def command(self) -> list[str]:
        """Ours."""
        numerics = ["--numerics", "mergekit-0.1.5"] if self.exact else []
        return [sys.executable, "-m", "kittybuild", self.program, *self.words, *numerics, "--store", "store"]

    def called(self, environment: str, folder: Path) -> list[str]:
        """The peer's. Its program for `merge` is named after YAML, and it looks for `base` on the Hub."""
        name = {"merge": "yaml"}.get(self.program, self.program)
        words = [str(folder / word) if (folder / word).is_dir() else word for word in self.words]
        return [f"{environment}/bin/{self.peer}-{name}", *words, "--no-write-model-card", "--quiet"]


# ---- judges: what differs, or nothing


def same_bits(ours: Path, theirs: Path) -> str:
    """Names, shapes, dtypes, bytes."""
    found, wanted = load_tensors(ours), load_tensors(theirs)
    if odd := _odd_names(found, wanted):
        return odd
    wrong = [n for n, t in wanted.items() if t.dtype != found[n].dtype or not torch.equal(t, found[n])]
    return f"{len(wrong)} tensors differ: {wrong[:3]}" if wrong else ""


def near(ours: Path, theirs: Path) -> str:
    """Elements within rounding."""
    found, wanted = load_tensors(ours), load_tensors(theirs)
    return _odd_names(found, wanted) or _apart(found, wanted, 2.0**-20)


def adapters(ours: Path, theirs: Path) -> str:
    """What two adapters add, and what they say of themselves."""
    found, wanted = load_tensors(ours), {n: t for n, t in load_tensors(theirs).items() if t.numel()}  # of rank 0
    base = {f"base_model.model.{name}": t for name, t in load_tensors(ours.parent / "base").items()}
    more = [n for n in wanted.keys() - found.keys() if n not in base or not torch.equal(wanted[n], base[n])]
    if more or found.keys() - wanted.keys():
        return f"other tensors: {sorted({*more, *(found.keys() - wanted.keys())})[:3]}"
    if odd := [n for n in found if found[n].shape != wanted[n].shape]:
        return f"other shapes: {odd[:3]}"
    factors = [name for name in found if ".lora_" in name]
    whole = [n for n in found if n not in factors and not torch.equal(found[n], wanted[n])]
    if whole:
        return f"saved tensors differ: {whole[:3]}"
    deltas = [{n: _product(each, n) for n in factors if "_A" in n} for each in (found, wanted)]
    return _apart(deltas[0], deltas[1], 2.0**-16) or _same_config(ours, theirs)


def _product(adapter: Mapping[str, Tensor], name: str) -> Tensor:
    """B A of the module whose A has this name."""
    return adapter[name.replace("_A", "_B")].double() @ adapter[name].double()


def _same_config(ours: Path, theirs: Path) -> str:
    found, wanted = (json.loads((each / "adapter_config.json").read_text()) for each in (ours, theirs))
    scales = [
        dict.fromkeys(("all",), each["lora_alpha"] / each["r"])
        | {key: alpha / each["rank_pattern"][key] for key, alpha in each["alpha_pattern"].items() if alpha}
        for each in (found, wanted)
    ]
    if any(scale != 1 for each in scales for scale in each.values()):
        return f"scales are {scales[0]}, theirs {scales[1]}"
    odd = [key for key in ("r", "use_rslora", "fan_in_fan_out") if found[key] != wanted[key]]
    return f"adapter_config.json differs in {odd}" if odd else ""


def drawn(ours: Path, theirs: Path) -> str:
    """Each layer of both is that of one of the models."""
    found, wanted = load_tensors(ours), load_tensors(theirs)
    if odd := _odd_names(found, wanted):
        return odd
    models = [load_tensors(ours.parent / name) for name in "ab"]
    for made in (found, wanted):
        for layer in range(LAYERS):
            names = [name for name in made if name.startswith(f"model.layers.{layer}.")]
            if not any(all(torch.equal(made[n], model[n]) for n in names) for model in models):
                return f"layer {layer} of {'ours' if made is found else 'theirs'} is no model's"
    return ""


def _odd_names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    odd = sorted(found.keys() ^ wanted.keys()) or [n for n in wanted if found[n].shape != wanted[n].shape]
    return f"other names or shapes: {odd[:3]}" if odd else "" if wanted else "nothing was written"


def _apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bound: float) -> str:
    far = {n: float((found[n].double() - t.double()).abs().max() / t.double().abs().max()) for n, t in wanted.items()}
    wrong = [f"{name}: {apart:.1e}" for name, apart in far.items() if not apart <= bound]
    return f"{len(wrong)} tensors differ: {wrong[:3]}" if wrong else ""


# ---- the cases


def cases() -> list[Case]:
    """All of them."""
    made = [
        Case("merge", ("ties.yml", "out", "--out-shard-size", "50k"), same_bits, "bits"),
        Case("merge", ("slices.yml", "out", "--clone-tensors"), same_bits, "bits"),
        Case(
            "multi", ("multi.yml", "--out-path", "out", "-I", "mid"), same_bits, "bits", ("out", "mid/soup", "mid/lerp")
        ),
        *(Case("pytorch", ("files.yml", "out", option), same_bits, "bits") for option in ("-i", "-u")),
        *(Case("legacy", words, same_bits, "bits") for words in LEGACY),
        Case("moe", ("moe.yml", "out"), same_bits, "bits", exact=False),
        *(Case("tokensurgeon", ("one", "two", "out", *words), near, "near", exact=False) for words in SURGEON),
        *(_extraction(words) for words in EXTRACTIONS),
        Case("layershuffle", (*SHUFFLE, "-w", "0.8", "-w", "0.2"), drawn, "structure", peer="mergekitty", exact=False),
        Case("merge-lora", ("base", "lora", "out"), near, "near", peer="mergekitty", exact=False),
    ]
    return made


LEGACY = (
    ("out", *("--merge", "a", "--merge", "b"), *("--weight", "0.6", "--weight", "0.3"), *("--base-model", "base")),
    ("out", *("--merge", "a", "--merge", "b"), *("--weight", "0.6"), *("--method", "linear")),
    ("out", *("--merge", "a"), *("--weight", "0.3"), *("--base-model", "base"), *("--method", "slerp")),
)
SURGEON = (("-a", "omp", "-k", "8"), ("-a", "mean"), ("-a", "common_interpolation", "-k", "4", "-c"))
SHUFFLE = ("out", "-m", "a", "-m", "b")
EXTRACTIONS = (
    ("--max-rank", "6"),
    ("--max-rank", "6", "--no-distribute-scale", "--skip-undecomposable"),
    ("--max-rank", "6", "--embed-lora"),
    ("--max-rank", "6", "--embed-lora", "--skip-undecomposable", "--save-module", "down_proj"),
    ("--max-rank", "6", "-e", "mlp", "-e", "k_proj"),
    ("--max-rank", "6", "-i", "self_attn", "-i", "embed", "-i", "lm_head"),
    (
        "--sv-epsilon",
        "0.21",
    ),
)


def _extraction(words: Sequence[str]) -> Case:
    models = ("--model", "tuned", "--base-model", "base", "--out-path", "out")
    return Case("extract-lora", (*models, *words), adapters, "adapter", exact=False)


def write_models(folder: Path) -> None:
    """All that the cases read."""
    pico_llama(folder / "base", 1, layers=LAYERS, dtype="float32", tokenizer=True)
    for seed, name in enumerate(("a", "b", "tuned"), 2):
        pico_llama(folder / name, seed, base=folder / "base", tokenizer=True)
    pico_adapter(folder / "lora", folder / "base", 4, targets=("q_proj", "down_proj"))
    write_tokenizer(folder / "lora", 64)
    for seed, name in enumerate(("m0", "m1", "m2")):
        pico(folder / name, "llama", seed)
    for name, files in tokenizers().items():
        write(folder, name, files)
        tensors = load_tensors(folder / name)
        save_tensors(folder / name / "model.safetensors", {**tensors, HEAD: tensors[EMBEDDING].clone()})
    for seed, name in enumerate("xyz"):
        more = {} if name == "z" else {"more": noise(seed, "more", (5, 7))}
        save_tensors(folder / f"{name}.safetensors", {"w": noise(seed, "w", (30, 40)), **more})
    for name, text in CONFIGS.items():
        write_recipe(folder, text, name)


def compared(case: Case, models: Path, environment: str) -> tuple[int, str]:
    """How many tensors there are, and what differs."""
    with tempfile.TemporaryDirectory() as top:
        ours, theirs = Path(top, "ours"), Path(top, "theirs")
        for folder in (ours, theirs):
            shutil.copytree(models, folder)
        call(case.command, ours)
        call(case.called(environment, theirs), theirs)
        problems = [case.judge(ours / folder, theirs / folder) for folder in case.folders]
        return sum(len(load_tensors(theirs / folder)) for folder in case.folders), "; ".join(filter(None, problems))


def main() -> int:
    """Run all cases, print a line each, return the exit status."""
    parser = parser_beside(__doc__)
    help_ = "the environment with mergekitty; without it, its programs are left out"
    parser.add_argument("--mergekitty", type=environment_at, metavar="DIR", help=help_)
    arguments = parser.parse_args()
    peers = {"mergekit": arguments.mergekit, "mergekitty": arguments.mergekitty}
    lines, failed = [], 0
    with tempfile.TemporaryDirectory() as models:
        write_models(Path(models))
        for case in cases():
            environment = peers[case.peer]
            words = " ".join((case.program, *case.words))
            if environment is None or not arguments.only.search(words):
                continue
            count, problem = compared(case, Path(models), environment)
            failed += bool(problem)
            lines.append(f"| `{words}` | {case.peer} | {count} | {case.counts} | {problem or 'ok'} |")
            print(lines[-1], flush=True)
    if arguments.write:
        arguments.write.write_text("\n".join([*HEAD_LINES, *lines]) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
