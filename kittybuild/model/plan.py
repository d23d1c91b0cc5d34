"""A plan: every tensor of every stage as a step, before anything is computed. A value: it prints, compares, hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kittybuild.model.derivation import Derivation, Input, StageTensor, Step

ADAPTER_CONFIG = "adapter_config.json"
Ignored = Mapping[str, Mapping[str, Sequence[str]]]
"""Names of tensors that are left out: by the pattern of `ignore`, then by the model."""


@dataclass(frozen=True)
class StagePlan:
    """One stage. `steps`: its tensors in output order; an Input among them is taken over as it is.

    `donor`: the source whose companion files go with the weights; `config`: its config.json as this stage changes it.
    `files`: companion files that it has otherwise than the donor (None: not at all).
    `shards`: the names of each shard, for a stage that becomes an output or is asked for by name; else empty.
    `keep`: whether computed tensors are kept in packs (False: made in memory when a consumer needs them). `allow_nan`:
    NaN and infinity among them are no error. `ignored`: what the recipe has it leave out.
    """

    name: str
    kind: str
    steps: Mapping[str, Step]
    donor: str | None
    config: Mapping[str, Any] | None
    shards: tuple[tuple[str, ...], ...] = ()
    keep: bool = True
    allow_nan: bool = False
    files: Mapping[str, bytes | None] = field(default_factory=dict)
    ignored: Ignored = field(default_factory=dict)

    @property
    def adapter(self) -> bool:
        """Whether it makes an adapter, which is one file of weights."""
        return ADAPTER_CONFIG in self.files

    @property
    def derivations(self) -> Mapping[str, Derivation]:
        """The tensors that are made here."""
        return {name: step for name, step in self.steps.items() if isinstance(step, Derivation)}


@dataclass(frozen=True)
class Plan:
    """The stages in the order in which they can be built, and what a person should know.

    `open`: stages of spectra on whose values others' shapes hang: with these known, it is to be lowered again.
    """

    stages: Mapping[str, StagePlan]
    notes: tuple[str, ...] = ()
    open: tuple[str, ...] = ()

    def step(self, tensor: StageTensor) -> Step:
        """The step behind a stage's tensor."""
        return self.stages[tensor.stage].steps[tensor.name]


def inputs_of(step: Step) -> tuple[Input, ...]:
    """What a step reads."""
    return step.inputs if isinstance(step, Derivation) else (step,)
