"""A derivation: one pure, fully specified step that makes one tensor.

Its key is a digest of all that can change the output's bits, with the inputs given by content; nothing else counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kittybuild.digest import Digest, tagged
from kittybuild.tensors import TensorRef, TensorSpec

KITTY_1 = "kitty-1"


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """An input that a source holds."""

    source: str
    name: str
    spec: TensorSpec


@dataclass(frozen=True, slots=True)
class StageTensor:
    """An input that another stage derives."""

    stage: str
    name: str
    spec: TensorSpec


Input = SourceTensor | StageTensor


@dataclass(frozen=True)
class Derivation:
    """One step: `builder` at `version` with `params` over `inputs`, in order, makes a tensor of the spec `output`.

    `numerics`: the class of arithmetic, then, where bits depend on it, `;` and the machine: `kitty-1`,
    `mergekit-0.1.5;torch 2.13.0 AVX512`.
    """

    builder: str
    version: int | str
    params: Mapping[str, Any]
    inputs: tuple[Input, ...]
    output: TensorSpec
    numerics: str = KITTY_1

    @property
    def spec(self) -> TensorSpec:
        """The spec of what it makes."""
        return self.output

    def key(self, inputs: Sequence[TensorRef]) -> Digest:
        """The derivation key, resolved over the contents of the inputs; raises ValueError if they do not fit."""
        if [ref.spec for ref in inputs] != [given.spec for given in self.inputs]:
            raise ValueError(f"{self.builder}: the contents do not fit the declared inputs")
        form = {
            "builder": self.builder,
            "version": self.version,
            "params": self.params,
            "inputs": [ref.to_json() for ref in inputs],
            "outputs": [self.output.to_json()],
            "numerics": self.numerics,
        }
        return tagged("kittybuild.drv.v1", form)


Step = Derivation | SourceTensor | StageTensor
"""What stands behind a tensor of a stage: a derivation, or another tensor taken as it is."""
