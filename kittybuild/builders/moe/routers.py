"""Rows of routers: one for each expert, of what its prompts look like to the base, or by chance.

A side of an expert is [start, prompts, rows of each] among the rows of the input: the positive one, and the negative
one or None. With negative prompts, their row is taken off; a row has length 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kittybuild.builders.base import Builder, Combine, Job
from kittybuild.builders.normals import normals, uniforms
from kittybuild.builders.numerics import tree_sums
from kittybuild.builders.random import Draws

if TYPE_CHECKING:
    from torch import Tensor

    from kittybuild.builders.floats import Array

_SHORTEST = 1e-8


def _handed_out(rows: Array) -> Combine:
    flat = rows.reshape(-1)
    return lambda block: flat[block.start : block.start + block.count]


def _embeddings(job: Job) -> Combine:
    """The sum of the embeddings of all tokens of a side, at length 1 (mergekit-moe's `cheap_embed`).

    Input: the rows of all tokens. Params: `experts`. Sums of rows in float64, in order; lengths by a fixed tree.
    """
    import numpy as np

    rows = job.whole(0).astype(np.float64)

    def side(start: int, prompts: int, each: int) -> Array:
        return _unit(np.add.accumulate(rows[start : start + prompts * each], axis=0)[-1])

    found = []
    for positive, negative in job.params["experts"]:
        row = side(*positive)
        found.append(_unit(row - side(*negative)) if negative else row)
    return _handed_out(np.stack(found))


def _unit(row: Array) -> Array:
    (square,) = tree_sums((row * row).reshape(1, -1))
    unit: Array = row / max(math.sqrt(square), _SHORTEST)
    return unit


def _states(job: Job) -> Combine:
    """The hidden state of the last token of each prompt (with `average`, of all rows of it), averaged over the prompts.

    Input: the states that go into a layer, [rows, width] in bfloat16. Params: `experts`, `average`. Every step is
    rounded to bfloat16, as mergekit-moe 0.1.5 does for `hidden` and `hidden_avg`.
    """
    import torch

    states = torch.frombuffer(job.stored(0), dtype=torch.bfloat16).reshape(job.inputs[0].shape)
    average = job.params["average"]

    def side(start: int, prompts: int, each: int) -> Tensor:
        batch = states[start : start + prompts * each].reshape(prompts, each, -1)
        return (batch.sum(1) / each if average else batch[:, -1]).mean(0)

    found = []
    for positive, negative in job.params["experts"]:
        row = side(*positive)
        row = row - side(*negative) if negative else row
        found.append(row / row.norm().clamp(min=_SHORTEST))
    rows = torch.stack(found)
    return _handed_out(rows.float().numpy())


def _random(job: Job) -> Combine:
    """Numbers by chance: standard normal, or (`normal` false) uniform up to 1 / sqrt(width) on both sides of 0.

    No input. Params: `normal`, `seed`, `tensor`.
    """
    draws, width = Draws(job.params["seed"], job.params["tensor"], 0), job.output.shape[1]
    if job.params["normal"]:
        return lambda block: normals(draws, block.start, block.count)
    edge = 1.0 / math.sqrt(width)
    return lambda block: (uniforms(draws, block.start, block.count) * 2.0 - 1.0) * edge


EMBEDDINGS = Builder("router_embeddings", 1, _embeddings, streamed=0, scratch=1, whole=16)
STATES = Builder("router_states", 1, _states, streamed=0, scratch=1, whole=8, machine=True)
RANDOM = Builder("router_random", 1, _random, scratch=12)
