"""One digest for all that a peer, or kittybuild in its numerics, makes of a case, on a CPU of a given kind.

    python -m tests.parity.peer_digests NUMERICS < KEYS

prints what kittybuild makes of the pico cases with these keys (a JSON list), as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from blake3 import blake3
from torch import Tensor

from tests.jobs import bits, spec_of
from tests.parity.exact_cases import Case, cases, write_pico
from tests.parity.ours import made_in_memory

CPUS = {
    "DEFAULT": {
        "ATEN_CPU_CAPABILITY": "default",
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Nehalem",
    },
    "AVX2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "AVX512": {"ATEN_CPU_CAPABILITY": "avx512", "OPENBLAS_CORETYPE": "SkylakeX"},
}
"""What makes a CPU of each kind out of a better one, for torch, numpy, and numpy's library."""
ALIKE = {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""And torch's library: it chooses by the maker of the CPU, too, unless it is told to do what all can."""


def shown_only(case: Case, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that a case compares."""
    return {name: tensor for name, tensor in tensors.items() if not any(part in name for part in case.without)}


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Over names, dtypes, shapes and bytes, in the order of the names; every NaN is the same one."""
    hasher = blake3()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name} {spec_of(tensor)}\n".encode())
        known = tensor.masked_fill(tensor.isnan(), float("nan")) if tensor.is_floating_point() else tensor
        hasher.update(bits(known))
    return hasher.hexdigest()[:32]


def ours(numerics: str, keys: Collection[str]) -> dict[str, str]:
    """The digests of what kittybuild makes of these cases, in this process."""
    chosen = [case for case in cases(numerics) if case.key in keys]
    with tempfile.TemporaryDirectory() as folder:
        write_pico(Path(folder))
        made = made_in_memory(numerics, chosen, Path(folder))
        return {case.key: digest(shown_only(case, tensors)) for case, tensors in made}


if __name__ == "__main__":
    json.dump(ours(sys.argv[1], json.load(sys.stdin)), sys.stdout)
