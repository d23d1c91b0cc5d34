"""What the bits of a peer's class depend on: found without torch, and compared with what torch finds."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kittybuild.errors import BuildError
from kittybuild.executor.machine import check_machine
from kittybuild.planner.machine import Machine, instructions, this_machine

PLAIN = frozenset({"sse4_2", "avx"})
NARROW = PLAIN | {"avx2", "fma"}
WIDE = NARROW | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (frozenset(), "DEFAULT"),
        (PLAIN, "DEFAULT"),
        (PLAIN | {"avx2"}, "DEFAULT"),
        (NARROW, "AVX2"),
        (NARROW | {"avx512f"}, "AVX2"),
        (WIDE - {"avx512dq"}, "AVX2"),
        (WIDE, "AVX512"),
    ],
)
def test_the_instruction_set_follows_from_the_flags(flags: frozenset[str], wanted: str) -> None:
    assert instructions(None, flags) == wanted
    assert instructions("AVX2", flags) == wanted, "torch ignores a word that it does not know"
    assert instructions("avx2", flags) == "AVX2"
    assert instructions("default", flags) == "DEFAULT"


def test_it_is_the_one_that_torch_finds() -> None:
    assert this_machine(None).instructions == torch.backends.cpu.get_cpu_capability()


@pytest.mark.parametrize("capability", ["default", "avx2", "nonsense"])
def test_and_it_is_when_torch_is_told_otherwise(capability: str) -> None:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    environment = {"ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert this_machine(capability).instructions == done.stdout.strip()


def test_the_text_names_numpy_only_where_it_counts() -> None:
    machine = Machine("2.13.0", "2.4.6", "AVX512")
    assert machine.text(numpy=False) == "torch 2.13.0 AVX512"
    assert machine.text(numpy=True) == "torch 2.13.0 numpy 2.4.6 AVX512"


class TestCheck:
    @pytest.mark.parametrize("numpy", [False, True])
    def test_this_machine_is_this_machine(self, numpy: bool) -> None:
        check_machine(f"mergekit-0.1.4;{this_machine(None).text(numpy=numpy)}")

    def test_a_class_that_names_none_is_at_home_everywhere(self) -> None:
        check_machine("kitty-1")

    def test_the_build_behind_the_plus_may_be_left_out(self) -> None:
        version = str(torch.__version__).partition("+")[0]
        check_machine(f"mergekit-0.1.5;torch {version} {torch.backends.cpu.get_cpu_capability()}")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("torch 1.0.0 {set}", "here is torch {torch}"),
            ("torch {torch}+rocm {set}", "here is torch {torch}"),
            ("torch {torch} numpy 1.0 {set}", "here is numpy"),
            ("torch {torch} MMX", "planned for torch {torch} MMX, but here is instruction set {set}"),
        ],
    )
    def test_another_one_is_refused(self, text: str, words: str) -> None:
        here = {"torch": str(torch.__version__), "set": torch.backends.cpu.get_cpu_capability()}
        with pytest.raises(BuildError) as caught:
            check_machine(f"mergekit-0.1.5;{text.format(**here)}")
        assert caught.value.code == "KB509"
        assert words.format(**here) in caught.value.message
        assert caught.value.hint
