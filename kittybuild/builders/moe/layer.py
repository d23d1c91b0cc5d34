"""One layer of a model, run on hidden states: transformers' own class, filled with the layer's weights alone.

A model of one layer is made of the config, and its embedding and last norm are left out: so masks, positions and
windows are transformers' own, for every architecture that it knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kittybuild.builders.base import Builder, Combine, Job
from kittybuild.builders.floats import numpy_dtype
from kittybuild.tensors import DType

if TYPE_CHECKING:
    from torch import Tensor


def _decoder_layer(job: Job) -> Combine:
    """The hidden states behind a layer, in bfloat16 throughout, as mergekit-moe runs the model.

    Inputs: the states before it [rows, width], then the layer's tensors. Params: `config` (JSON), `layer`, `names` (of
    the tensors, below the layer), `prompts` (for each batch, the tokens of each prompt; shorter ones are filled on the
    left, and the filling is masked).
    """
    import torch

    states = _tensor(job, 0)
    weights = {name: _tensor(job, index) for index, name in enumerate(job.params["names"], start=1)}
    model = _one_layer(json.loads(job.params["config"]), job.params["layer"], weights, states.shape[1])
    found, start = torch.empty_like(states), 0
    with torch.no_grad():
        for lengths in job.params["prompts"]:
            end = start + len(lengths) * max(lengths)
            batch = states[start:end].reshape(len(lengths), max(lengths), -1)
            behind = model(inputs_embeds=batch, attention_mask=_mask(lengths), use_cache=False).last_hidden_state
            found[start:end] = behind.reshape(end - start, -1)
            start = end
    result = found.reshape(-1).view(torch.int16).numpy().view(numpy_dtype(DType.BF16))
    return lambda block: result[block.start : block.start + block.count]


def _mask(lengths: Sequence[int]) -> Tensor:
    import torch

    longest = max(lengths)
    return torch.tensor([[0] * (longest - length) + [1] * length for length in lengths])


def _one_layer(config: Mapping[str, Any], layer: int, weights: Mapping[str, Tensor], width: int) -> Any:
    """A model that is this layer only."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModel
    from transformers.utils import logging

    one = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    if types := getattr(one, "layer_types", None):
        one.layer_types = [types[layer]]
    one.num_hidden_layers, one.vocab_size, one.pad_token_id = 1, 1, None
    unused = {"embed_tokens.weight": torch.zeros(1, width), "norm.weight": torch.ones(width)}
    state = {**{f"layers.0.{name}": weight for name, weight in weights.items()}, **unused}
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    kind: Any = AutoModel._model_mapping[type(one)]
    model = kind.from_pretrained(None, config=one, state_dict=state, dtype=torch.bfloat16)
    model.norm = torch.nn.Identity()
    return model


def _tensor(job: Job, index: int) -> Tensor:
    """An input in bfloat16."""
    import torch

    spec = job.inputs[index]
    stored = torch.frombuffer(job.stored(index), dtype=getattr(torch, spec.dtype.torch_name))
    return stored.reshape(spec.shape).to(torch.bfloat16)


DECODER_LAYER = Builder("decoder_layer", 1, _decoder_layer, streamed=0, scratch=2, whole=6, machine=True)
