"""The options of mergekit and mergekitty that change nothing here, each with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_CPU = "everything is computed on the CPU, with the same bits on every machine"
_MEMORY = "--memory says how much memory is used"
_STREAMED = "tensors are read in blocks, as they are needed"
_KEPT = "what was made is in the store, whose --store chooses it"

NOTES: Mapping[str, str] = MappingProxyType(
    {
        "--allow-crimes/--no-allow-crimes": "names and shapes decide what fits, not what the architecture is called",
        "--transformers-cache PATH": "models come into the ordinary Hugging Face cache: HF_HUB_CACHE moves it",
        "--lora-merge-cache PATH": f"adapters are applied tensor by tensor; {_KEPT}",
        "--lora-merge-dtype NAME": "an adapter is added in float32 and rounded once, to the dtype of its base",
        "--cuda/--no-cuda": _CPU,
        "--device NAME": _CPU,
        "--compute-device NAME": _CPU,
        "--storage-device NAME": _CPU,
        "--load-to-compute/--no-load-to-compute": _CPU,
        "--low-cpu-memory/--no-low-cpu-memory": _MEMORY,
        "--read-to-gpu/--no-read-to-gpu": _CPU,
        "--multi-gpu/--no-multi-gpu": _CPU,
        "--gpu-rich/--no-gpu-rich": _CPU,
        "--copy-tokenizer/--no-copy-tokenizer": "the tokenizer always goes with the weights",
        "--clone-tensors/--no-clone-tensors": "every tensor is written by itself",
        "--trust-remote-code/--no-trust-remote-code": "no code of a model is ever run",
        "--lazy-unpickle/--no-lazy-unpickle": _STREAMED,
        "--write-model-card/--no-write-model-card": "the card is always written, with the recipe",
        "--safe-serialization/--no-safe-serialization": "weights are always written as safetensors",
        "--async-write/--no-async-write": "shards are always written beside the work",
        "--write-threads N": "--jobs says how many tensors are made and written side by side",
        "--executor NAME": "--jobs says how many tensors are made side by side",
    }
)
"""Options of the peers that change nothing here -> why."""
