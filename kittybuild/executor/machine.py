"""The machine that a derivation's class names is the one that torch and numpy find: else its key would lie."""

from __future__ import annotations

from kittybuild.errors import BuildError


def check_machine(numerics: str) -> None:
    """Raise BuildError KB509 if a class of arithmetic names another torch, numpy or instruction set than there is."""
    words = numerics.partition(";")[2].split()
    if not words:
        return
    import numpy

    wanted = dict(zip(words[:-1:2], words[1::2], strict=False))
    versions, capability = {"numpy": numpy.__version__}, words[-1]
    if "torch" in wanted:
        import torch

        versions["torch"], capability = str(torch.__version__), torch.backends.cpu.get_cpu_capability()
    if "transformers" in wanted:
        import transformers

        versions["transformers"] = transformers.__version__
    wrong = {name: versions[name] for name, version in wanted.items() if not _is(versions[name], version)}
    if capability != words[-1]:
        wrong["instruction set"] = capability
    if wrong:
        found = ", ".join(f"{name} {value}" for name, value in wrong.items())
        hint = "set ATEN_CPU_CAPABILITY to default, avx2 or avx512: plan and torch both heed it"
        if "instruction set" not in wrong:
            hint = "more than one installation is on Python's path: name one environment"
        raise BuildError("KB509", f"planned for {' '.join(words)}, but here is {found}", hint=hint)


def _is(found: str, wanted: str) -> bool:
    """Whether a version is the one that a package's metadata names (which may leave out the build behind the `+`)."""
    return wanted in (found, found.partition("+")[0])
