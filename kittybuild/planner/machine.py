"""What the bits of a peer's arithmetic depend on beside the recipe: torch, numpy, the CPU's instructions.

Found without starting torch. The executor asks torch itself, and refuses to work where it says something else.
"""

from __future__ import annotations

import platform
from contextlib import suppress
from dataclasses import dataclass

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.opening import package_version
from kittybuild.model.recipe import (
    ExtractLoraStage,
    MergeAdaptersStage,
    MergeStage,
    MoeStage,
    Stage,
    TransplantStage,
)
from kittybuild.planner.peers import rules_of

_FORCED = ("default", "avx2", "avx512")
_WIDE = frozenset({"avx512vl", "avx512bw", "avx512dq", "fma"})
_NARROW = frozenset({"avx2", "fma"})


@dataclass(frozen=True, slots=True)
class Machine:
    """Versions of libraries, and the instruction set as torch names it (`AVX512`, `AVX2`, `DEFAULT`)."""

    torch: str
    numpy: str
    instructions: str
    transformers: str = "unknown"

    def text(self, *, numpy: bool, transformers: bool = False) -> str:
        """As a derivation's class of arithmetic names it: `torch 2.13.0 AVX512`."""
        words = [f"torch {self.torch}"]
        words += [f"numpy {self.numpy}"] if numpy else []
        words += [f"transformers {self.transformers}"] if transformers else []
        return " ".join([*words, self.instructions])

    def numpy_text(self) -> str:
        """The same where torch takes no part: `numpy 2.4.0 AVX512`."""
        return f"numpy {self.numpy} {self.instructions}"


def by_machine(stage: Stage, builders: Builders) -> bool:
    """Whether the bits of a stage depend on the machine."""
    if isinstance(stage, TransplantStage):
        return builders[stage.approximation.builder].machine
    if isinstance(stage, MoeStage):
        return stage.runs_base
    if isinstance(stage, (ExtractLoraStage, MergeAdaptersStage)):
        return stage.decomposition is not None
    return isinstance(stage, MergeStage) and rules_of(stage.numerics).peer


def this_machine(capability: str | None) -> Machine:
    """The machine that we run on. `capability`: what ATEN_CPU_CAPABILITY says, which torch heeds."""
    torch, numpy, transformers = map(package_version, ("torch", "numpy", "transformers"))
    return Machine(torch, numpy, instructions(capability, _flags()), transformers)


def instructions(capability: str | None, flags: frozenset[str]) -> str:
    """The instruction set that torch takes on a CPU with these flags."""
    if capability in _FORCED:
        return capability.upper()
    if flags >= _WIDE:
        return "AVX512"
    return "AVX2" if flags >= _NARROW else "DEFAULT"


def _flags() -> frozenset[str]:
    """The flags of an x86 CPU as Linux tells them; none where it does not."""
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as text:
            for line in text:
                if line.startswith("flags"):
                    return frozenset(line.split())
    return frozenset()
