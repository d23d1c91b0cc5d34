"""An apply_lora stage lowered to one derivation for each weight that an adapter changes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.adapter import Adapter, read_adapter
from kittybuild.checkpoint.source import Checkpoint
from kittybuild.errors import KittybuildError, PlanError, nearest
from kittybuild.model.derivation import Derivation, Input, SourceTensor, Step
from kittybuild.model.recipe import ApplyLoraStage
from kittybuild.planner.names import natural
from kittybuild.planner.views import View
from kittybuild.tensors import Shape


@dataclass(frozen=True)
class Applied:
    """An adapter in use: the source's name, its factors, the weight of its difference."""

    source: str
    checkpoint: Checkpoint
    adapter: Adapter
    weight: float


def lower_lora(
    stage: ApplyLoraStage,
    base: View,
    adapters: Sequence[tuple[str, Checkpoint, float]],
    builders: Builders,
    problems: list[KittybuildError],
) -> dict[str, Step]:
    """The steps of all tensors of the base, in natural order; those that no adapter names are taken as they are."""
    applied = []
    for source, checkpoint, weight in adapters:
        try:
            applied.append(Applied(source, checkpoint, read_adapter(checkpoint), weight))
        except KittybuildError as error:
            problems.append(error)
    for use in applied:
        _check(stage, base, use, problems)
    if len({use.adapter.transposed for use in applied}) > 1:
        sides = ", ".join(f"{use.source} {'true' if use.adapter.transposed else 'false'}" for use in applied)
        message = f"the adapters disagree on how {base.label} keeps its weights (fan_in_fan_out: {sides})"
        problems.append(PlanError("KB310", message, at=str(stage.at), hint="is each of them made for this base?"))
    dtype = stage.out_dtype or stage.dtype
    steps: dict[str, Step] = {}
    for name in sorted(base.tensors, key=natural):
        given = base.tensors[name]
        output = given.spec.with_dtype(dtype) if dtype and given.spec.dtype.is_float else given.spec
        module = name.removesuffix(".weight")
        here = [use for use in applied if module in use.adapter.modules and name.endswith(".weight")]
        if here:
            scales = [use.weight * use.adapter.modules[module].scale for use in here]
            params = {"scales": scales, "transposed": here[0].adapter.transposed}
            inputs = (given, *(factor for use in here for factor in _factors(use, module)))
            steps[name] = Derivation("lora", builders["lora"].version, params, inputs, output)
        elif output != given.spec:
            steps[name] = Derivation("cast", builders["cast"].version, {}, (given,), output)
        else:
            steps[name] = given
    return steps


def _factors(use: Applied, module: str) -> tuple[Input, Input]:
    pair = use.adapter.modules[module]
    return SourceTensor(use.source, pair.a.name, pair.a.spec), SourceTensor(use.source, pair.b.name, pair.b.spec)


def _check(stage: ApplyLoraStage, base: View, use: Applied, problems: list[KittybuildError]) -> None:
    """Every module of the adapter has a weight in the base, of the adapter's shape."""
    unknown = sorted((m for m in use.adapter.modules if f"{m}.weight" not in base.tensors), key=natural)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        message = f"{base.label} has no weight for {unknown[0]}{more}, which the adapter {use.source} changes"
        hint = "is the adapter made for this base?"
        if len(unknown) == 1:
            hint = nearest(f"{unknown[0]}.weight", base.tensors)
        problems.append(PlanError("KB306", message, at=str(stage.at), hint=hint))
    wrong = {}
    for module, pair in use.adapter.modules.items():
        weight = base.tensors.get(f"{module}.weight")
        wanted = (pair.b.spec.shape[0], pair.a.spec.shape[1])
        wanted = (wanted[1], wanted[0]) if use.adapter.transposed else wanted
        if weight and weight.spec.shape != wanted:
            wrong[module] = (weight.spec.shape, wanted)
        elif weight and not weight.spec.dtype.is_float:
            message = f"{module}.weight of {base.label} is {weight.spec}: an adapter adds to floating point only"
            problems.append(PlanError("KB311", message, at=str(stage.at), hint="give the base before quantisation"))
    _report_shapes(stage, base, use, wrong, problems)


def _report_shapes(
    stage: ApplyLoraStage,
    base: View,
    use: Applied,
    wrong: Mapping[str, tuple[Shape, Shape]],
    problems: list[KittybuildError],
) -> None:
    if wrong:
        module, (has, wanted) = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        message = f"{module}: {base.label} has {list(has)}, the adapter {use.source} is for {list(wanted)}{more}"
        hint = "the adapter was made for a base of another size"
        problems.append(PlanError("KB301", message, at=str(stage.at), hint=hint))
