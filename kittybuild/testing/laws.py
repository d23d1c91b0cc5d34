"""The laws of a merge method. They hold whatever it computes; a method that breaks one would break a promise.

Inputs and parameters are fixed, so that a law that is broken here is broken everywhere.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from kittybuild.builders.base import BLOCK, Builder
from kittybuild.builders.floats import numpy_dtype
from kittybuild.model.method import Method, Param, Scalar
from kittybuild.tensors import DType
from kittybuild.testing.holding import held_by_blocks
from kittybuild.testing.memory import drawn, run, same_bits, spec_of

if TYPE_CHECKING:
    from kittybuild.builders.floats import Array

FLOATS = (DType.F32, DType.BF16, DType.F16, DType.F64)
SHAPES = ((), (0,), (1,), (3, 0, 2), (40,), (5, 7))
LONG = (7, 20_011)  # two leaves, and some that is no whole one
SLACK = 64 * 1024


class BrokenLaw(AssertionError):
    """A law that a method breaks, and how."""


@dataclass(frozen=True)
class Trial:
    """A method with parameters for `count` inputs; `plain`: with its defaults."""

    builder: Builder
    params: Mapping[str, Any]
    count: int
    plain: bool

    def inputs(self, *shape: int, dtype: DType = DType.F32) -> list[Array]:
        """A base and siblings near it; they are not to be written."""
        return list(_siblings(self.count, shape, dtype))

    def __str__(self) -> str:
        shown = {name: value for name, value in self.params.items() if name not in ("seed", "tensor")}
        return f"{self.builder.name} of {self.count} inputs with {shown}"


@functools.lru_cache(maxsize=32)
def _siblings(count: int, shape: tuple[int, ...], dtype: DType) -> tuple[Array, ...]:
    """The same for every law and trial, and so drawn once."""
    base = drawn("base", *shape, dtype=DType.F64)
    near = [base + drawn(f"sibling {number}", *shape, dtype=DType.F64) / 50 for number in range(1, count)]
    found = tuple(np.asarray(array).astype(numpy_dtype(dtype)) for array in (base, *near))
    for array in found:
        array.flags.writeable = False
    return found


def check_method(
    builder: Builder, *, params: Mapping[str, Scalar] = MappingProxyType({}), except_for: Collection[str] = ()
) -> None:
    """Raise BrokenLaw if a merge method breaks one of LAWS; `except_for` names those that do not apply to it.

    Every law is tried with the fewest models that the method takes and with three; with its defaults (`params` in
    place of them, 0.5 for a required number), and with each parameter in turn at the ends of its range or at another
    word. `params` has one value a name, which all models get.
    """
    if unknown := sorted(set(except_for) - set(LAWS)):
        raise ValueError(f"no laws: {', '.join(unknown)} (there are {', '.join(LAWS)})")
    trials = list(_trials(builder, params))
    if not any(trial.plain for trial in trials):
        raise BrokenLaw(f"{builder.name}: its `check` refuses its defaults: give others as `params`")
    for name, law in LAWS.items():
        for trial in trials if name not in except_for else ():
            law(trial)


def _trials(builder: Builder, given: Mapping[str, Scalar]) -> Iterator[Trial]:
    method = builder.method
    if method is None:
        raise ValueError(f"{builder.name} is no merge method: it has no `method`")
    most = 3 if method.most is None else min(3, method.most)
    for based in {"required": (True,), "optional": (True, False), "ordinary": (False,)}[method.base]:
        for models in dict.fromkeys((max(1, method.least), max(1, method.least, most))):
            for number, values in enumerate(_variations(method, given)):
                params = _params(builder, values, models, based=based)
                if method.check(params) is None:
                    yield Trial(builder, params, models + based, plain=number == 0)


def _variations(method: Method, given: Mapping[str, Scalar]) -> Iterator[Mapping[str, Scalar | None]]:
    """The defaults, and then each parameter at each of its other values, one at a time."""
    plain = {param.name: given.get(param.name, _plain(param)) for param in method.params if not param.accepted}
    yield plain
    for param in method.params:
        others: list[Scalar] = [*param.choices, *(end for end in (param.low, param.high) if end is not None)]
        others += [True, False] if param.kind is bool else []
        for value in others if not param.accepted else ():
            if value != plain[param.name]:
                yield {**plain, param.name: param.parse(value)}


def _plain(param: Param) -> Scalar | None:
    if param.default is not None or not param.required:
        return param.default
    if param.kind in (bool, str):
        return param.parse(param.choices[0] if param.choices else True)
    low, high = param.low, param.high
    value = 0.5 if low is None or low <= 0.5 else low
    return param.parse(round(value) if param.kind is int else value if high is None else min(value, high))


def _params(builder: Builder, values: Mapping[str, Any], models: int, *, based: bool) -> dict[str, Any]:
    method = builder.method
    assert method is not None  # the caller looked
    params = {
        param.name: [values[param.name]] * models if param.scope == "input" else values[param.name]
        for param in method.params
        if not param.accepted
    }
    if method.base == "optional":
        params["base"] = based
    return params | ({"seed": 7, "tensor": "model.norm.weight"} if builder.seeded else {})


# ---- the laws


def _blocks(trial: Trial) -> None:
    """The same bits however the tensor is cut into blocks."""
    for dtype in (DType.BF16, DType.F64):
        inputs = trial.inputs(*LONG, dtype=dtype)
        whole = _made(trial, inputs, blocks=1000)
        for blocks in (1, 2, 3):
            _same(trial, _made(trial, inputs, blocks=blocks), whole, f"with {blocks} leaves or rows a block")


def _runs(trial: Trial) -> None:
    """The same bits whenever it is run, and inputs that are left as they were."""
    inputs = trial.inputs(5, 7)
    before = [array.copy() for array in inputs]
    first = _made(trial, inputs)
    _same(trial, _made(trial, inputs), first, "run again")
    for array, was in zip(inputs, before, strict=True):
        _same(trial, array, was, "in an input, after the run")


def _threads(trial: Trial) -> None:
    """The same bits in several threads at once."""
    inputs = trial.inputs(*LONG)
    alone = _made(trial, inputs)
    together = threading.Barrier(4)

    def one(_: int) -> Array:
        together.wait()
        return _made(trial, inputs)

    with ThreadPoolExecutor(4) as pool:
        for made in pool.map(one, range(4)):
            _same(trial, made, alone, "in four threads at once")


def _dtypes(trial: Trial) -> None:
    """Any float dtypes, mixed too, into any: finite where the inputs are."""
    for dtype in FLOATS:
        _finite(trial, trial.inputs(40, dtype=dtype), dtype)
    mixed = [trial.inputs(40, dtype=FLOATS[index % 3])[index] for index in range(trial.count)]
    _finite(trial, mixed, DType.BF16)


def _shapes(trial: Trial) -> None:
    """Any shape, with no element or one or many."""
    for shape in SHAPES:
        _finite(trial, trial.inputs(*shape), DType.F32)


def _identical(trial: Trial) -> None:
    """With the defaults, equal models (of equal weights) merge to themselves, but for rounding."""
    if not trial.plain:
        return
    array = drawn("base", 5, 7)
    far = np.abs(_made(trial, [array] * trial.count) - array).max()
    if not far <= 1e-5:
        raise BrokenLaw(f"{trial}: equal inputs give something else, up to {far:.3g} away")


def _seeds(trial: Trial) -> None:
    """A method that draws random numbers draws others for another seed and another tensor, and only then."""
    method, builder = trial.builder.method, trial.builder
    if method is None or method.random != builder.seeded:
        raise BrokenLaw(f"{builder.name}: `seeded` of the Builder and `random` of its Method go together")
    shares = {name: [0.5] * len(value) for name, value in trial.params.items() if isinstance(value, list)}
    params = {**trial.params, **{name: value for name, value in shares.items() if _takes(method, name)}}
    if not method.random or method.check(params) is not None:
        return
    inputs = trial.inputs(*LONG)
    first = run(builder, inputs, params)
    for changed in ({"seed": 8}, {"tensor": "lm_head.weight"}):
        if same_bits(run(builder, inputs, {**params, **changed}), first):
            raise BrokenLaw(f"{trial}: the same bits with {changed}")


def _takes(method: Method, name: str) -> bool:
    """Whether 0.5 is a value of a parameter."""
    param = method.param(name)
    return (
        param is not None
        and param.kind is float
        and (param.low or 0) <= 0.5 <= (1 if param.high is None else param.high)
    )


def _scratch(trial: Trial) -> None:
    """`scratch` is no less than what a block's work holds beside its inputs."""
    if trial.builder.streamed is not None:
        return
    block = 2 * BLOCK
    held = held_by_blocks(trial.builder, trial.inputs(6 * 64, BLOCK // 64), trial.params, block)
    if held > 4 * block * trial.builder.scratch + SLACK:
        needed = -(-(held - SLACK) // (4 * block))
        raise BrokenLaw(f"{trial}: it has scratch={trial.builder.scratch}, but holds {needed} blocks beside its inputs")


LAWS: Mapping[str, Callable[[Trial], None]] = MappingProxyType(
    {
        "runs": _runs,
        "blocks": _blocks,
        "threads": _threads,
        "dtypes": _dtypes,
        "shapes": _shapes,
        "identical": _identical,
        "seeds": _seeds,
        "scratch": _scratch,
    }
)


def _made(trial: Trial, inputs: list[Array], *, dtype: DType | None = None, blocks: int = 4) -> Array:
    try:
        return run(trial.builder, inputs, trial.params, dtype=dtype, blocks=blocks)
    except Exception as error:
        raise BrokenLaw(f"{trial}: {type(error).__name__} on {_told(inputs)}: {error}") from error


def _told(inputs: list[Array]) -> str:
    return ", ".join(str(spec_of(array)) for array in inputs)


def _same(trial: Trial, found: Array, wanted: Array, when: str) -> None:
    if not same_bits(found, wanted):
        raise BrokenLaw(f"{trial}: other bits {when}")


def _finite(trial: Trial, inputs: list[Array], dtype: DType) -> None:
    found = _made(trial, inputs, dtype=dtype)
    if not np.isfinite(found.astype(np.float64)).all():
        raise BrokenLaw(f"{trial}: NaN or infinity from finite inputs ({_told(inputs)})")
