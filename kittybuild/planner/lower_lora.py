"""An apply_lora stage lowered to one derivation for each weight that an adapter changes. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kittybuild.builders.base import Builders
from kittybuild.checkpoint.adapter import Adapter, Factors, Part, adapter_of
from kittybuild.errors import KittybuildError, PlanError, nearest
from kittybuild.model.derivation import Derivation, Input, Step
from kittybuild.model.recipe import ApplyLoraStage
from kittybuild.planner.names import is_vocabulary, natural
from kittybuild.planner.views import View
from kittybuild.tensors import Shape


@dataclass(frozen=True)
class Applied:
    """An adapter in use: its name, its tensors, what they mean, the weight of its difference; its base's name."""

    label: str
    tensors: Mapping[str, Input]
    adapter: Adapter
    weight: float
    base: str = ""

    @classmethod
    def of(cls, view: View, weight: float, where: str | None = None) -> Applied:
        """The adapter of a source or a stage. Raises SourceError."""
        specs = {name: given.spec for name, given in view.tensors.items()}
        config = view.config or {}
        base = str(config.get("base_model_name_or_path") or "")
        return cls(view.label, view.tensors, adapter_of(where or view.label, config, specs), weight, base)

    def factors(self, tensor: str) -> Factors | None:
        """The factors of the module whose weight that is."""
        return self.adapter.modules.get(tensor.removesuffix(".weight")) if tensor.endswith(".weight") else None

    def given(self, part: Part) -> Input:
        """One of its tensors."""
        return self.tensors[part.name]

    def without(self, module: str) -> Applied:
        """It, but for one module."""
        modules = {name: pair for name, pair in self.adapter.modules.items() if name != module}
        whole = {name: part for name, part in self.adapter.whole.items() if name.rpartition(".")[0] != module}
        return replace(self, adapter=replace(self.adapter, modules=modules, whole=whole))


class LoraLowering:
    """One stage on its way to steps. `problems` collects what is wrong."""

    def __init__(
        self,
        stage: ApplyLoraStage,
        base: View,
        adapters: Sequence[Applied],
        builders: Builders,
        problems: list[KittybuildError],
    ) -> None:
        self.stage, self.base, self.builders, self.problems = stage, base, builders, problems
        self.applied = [_without_tied_head(use, base) for use in adapters]
        for use in self.applied:
            self._check(use)
        if len({use.adapter.transposed for use in self.applied if use.adapter.modules}) > 1:
            sides = ", ".join(f"{use.label} {str(use.adapter.transposed).lower()}" for use in self.applied)
            message = f"the adapters disagree on how {base.label} keeps its weights (fan_in_fan_out: {sides})"
            self._fail("KB310", message, "is each of them made for this base?")

    def steps(self) -> dict[str, Step]:
        """The steps of all tensors of the base, in natural order; those that no adapter names are taken as they are."""
        return {name: self._step(name) for name in sorted(self.base.tensors, key=natural)}

    def _step(self, name: str) -> Step:
        given, stage = self.base.tensors[name], self.stage
        dtype = stage.out_dtype or stage.dtype
        output = given.spec.with_dtype(dtype) if dtype and given.spec.dtype.is_float else given.spec
        factored = [use for use in self.applied if use.factors(name)]
        whole = [(use.given(use.adapter.whole[name]), use.weight) for use in self.applied if name in use.adapter.whole]
        added = [
            (use.given(use.adapter.added[name][0]), use.weight * use.adapter.added[name][1])
            for use in self.applied
            if name in use.adapter.added
        ]
        if whole and (factored or added):
            if len(whole) > 1 or whole[0][1] != 1.0 or len({use.label for use in factored}) > 1 or added:
                message = f"one adapter takes the place of {name}, another adds to it: the sum has no meaning"
                self._fail("KB362", message, "apply them in two stages, one after the other")
            given = whole[0][0]
        if factored:
            return self._changed(name, given, factored, output.dtype)
        if added:
            return self._sum([(given, 1.0), *added], output.dtype)
        if whole and (len(whole) > 1 or whole[0][1] != 1.0):
            return self._sum([(given, 1.0 - sum(weight for _, weight in whole)), *whole], output.dtype)
        given = whole[0][0] if whole else given
        if given.spec == output:
            return given
        return Derivation("cast", self.builders["cast"].version, {}, (given,), output)

    def _changed(self, name: str, given: Input, uses: Sequence[Applied], dtype: object) -> Derivation:
        """A weight plus what adapters add to it as factors."""
        pairs = [(use, pair) for use in uses if (pair := use.factors(name))]
        output = given.spec.with_dtype(dtype)  # type: ignore[arg-type]
        inputs = [given]
        for use, pair in pairs:
            parts = (pair.a, pair.b, *((pair.magnitude,) if pair.magnitude else ()))
            inputs += [use.given(part) for part in parts]
        if any(pair.magnitude for _, pair in pairs):
            params = {
                "scales": [pair.scale for _, pair in pairs],
                "weights": [use.weight for use, _ in pairs],
                "magnitudes": [pair.magnitude is not None for _, pair in pairs],
            }
            return Derivation("dora", self.builders["dora"].version, params, tuple(inputs), output)
        transposed = pairs[0][1].embedding or pairs[0][0].adapter.transposed
        params = {"scales": [use.weight * pair.scale for use, pair in pairs], "transposed": transposed}
        return Derivation("lora", self.builders["lora"].version, params, tuple(inputs), output)

    def _sum(self, terms: Sequence[tuple[Input, float]], dtype: object) -> Derivation:
        params = {"weight": [weight for _, weight in terms], "normalize": False}
        output = terms[0][0].spec.with_dtype(dtype)  # type: ignore[arg-type]
        return Derivation("linear", self.builders["linear"].version, params, tuple(given for given, _ in terms), output)

    def _fail(self, code: str, message: str, hint: str | None) -> None:
        self.problems.append(PlanError(code, message, at=str(self.stage.at), hint=hint))

    def _check(self, use: Applied) -> None:
        """What an adapter changes is in the base, and of the adapter's shape."""
        base, adapter = self.base, use.adapter
        targets = {f"{module}.weight": module for module in adapter.modules}
        targets |= {name: name for name in (*adapter.whole, *adapter.added)}
        if unknown := sorted((name for name in targets if name not in base.tensors), key=natural):
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            message = (
                f"{base.label} has no weight for {targets[unknown[0]]}{more}, which the adapter {use.label} changes"
            )
            hint: str | None = "is the adapter made for this base?"
            if len(unknown) == 1:
                hint = nearest(unknown[0], base.tensors)
            self._fail("KB306", message, hint)
        wrong = {}
        wanted = {f"{module}.weight": _wanted(pair, adapter) for module, pair in adapter.modules.items()}
        wanted |= {name: part.spec.shape for name, part in adapter.whole.items() if name not in wanted}
        wanted |= {name: part.spec.shape for name, (part, _) in adapter.added.items()}
        for name, shape in wanted.items():
            weight = base.tensors.get(name)
            if weight and weight.spec.shape != shape:
                wrong[targets[name]] = (weight.spec.shape, shape)
            elif weight and not weight.spec.dtype.is_float:
                message = f"{name} of {base.label} is {weight.spec}: an adapter adds to floating point only"
                self._fail("KB311", message, "give the base before quantisation")
        if wrong:
            module, (has, shape) = next(iter(wrong.items()))
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            message = f"{module}: {base.label} has {list(has)}, the adapter {use.label} is for {list(shape)}{more}"
            self._fail("KB301", message, "the adapter was made for a base of another size")


def _wanted(pair: Factors, adapter: Adapter) -> Shape:
    """The shape of the weight that factors are for."""
    return pair.matrix[::-1] if pair.embedding or adapter.transposed else pair.matrix


def _without_tied_head(use: Applied, base: View) -> Applied:
    """An adapter without what it holds for a head that the base does not have: its embeddings say the same."""
    heads = {f"{module}.weight" for module in use.adapter.modules} | use.adapter.whole.keys()
    tied = (base.config or {}).get("tie_word_embeddings", True)
    for name in [name for name in heads if tied and is_vocabulary(name) and name not in base.tensors]:
        if any(is_vocabulary(other) for other in heads - {name}):
            use = use.without(name.removesuffix(".weight"))
    return use
