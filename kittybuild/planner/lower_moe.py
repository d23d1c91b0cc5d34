"""A moe stage lowered: the base's tensors, the experts' MLPs under new names, and routers. Pure.

What is only renamed is taken over as it is: no arithmetic, no second copy in the store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError, PlanError
from kittybuild.model.derivation import Derivation, Input, StageTensor, Step
from kittybuild.model.recipe import Expert, ModelRef, MoeStage
from kittybuild.planner.gates import EMBEDDING, STATES, Gates
from kittybuild.planner.machine import Machine
from kittybuild.planner.moe_families import FAMILIES, MATRICES, Family, Sizes, assumed, family_config, named
from kittybuild.planner.names import natural
from kittybuild.planner.views import View
from kittybuild.tensors import DType, TensorSpec

_DENSE = re.compile(r"model\.layers\.([0-9]+)\.mlp\.(?:experts\.0\.)?(gate|up|down)_proj\.weight")
_LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
_ROUTER_OF_ONE = re.compile(r"model\.layers\.[0-9]+\.mlp\.gate\.weight")

Matrices = dict[tuple[int, str], Input]
"""A dense model's MLPs: by layer, and `gate`, `up` or `down`."""


class MoeLowering:
    """One stage on its way to steps. `problems` collects what is wrong, `notes` what a person should know."""

    def __init__(
        self,
        stage: MoeStage,
        view: Callable[[ModelRef], View],
        files: Mapping[str, bytes],
        builders: Builders,
        problems: list[KittybuildError],
        seed: int,
        machine: Machine | None,
    ) -> None:
        self.stage, self.view, self.builders, self.problems, self.seed = stage, view, builders, problems, seed
        self.base = view(stage.base)
        self.notes: list[str] = []
        self.gates: Gates | None = None
        self.changed: dict[str, Derivation] = {}
        self.family = self._family()
        self.layers, self.inner = 0, 0
        self.label = f"{stage.name}/experts"
        self._files, self._machine = files, machine

    def steps(self) -> dict[str, Step]:
        """The output's tensors in natural order; none where something is wrong (noted)."""
        if self.family is None:
            return {}
        before = len(self.problems)
        self._check_base()
        experts = [self._matrices(expert) for expert in self.stage.experts]
        shared = [self._matrices(expert) for expert in self.stage.shared]
        if len(self.problems) > before:
            return {}
        self._check_shared()
        self._note_counts()
        self.gates = Gates(self.stage, self.base, self._files, self.builders, self.seed, self._machine, self.problems)
        if len(self.problems) > before:
            return {}
        steps = self._of_base()
        for layer in range(self.layers):
            self._mlps(layer, experts, shared, steps)
            self._routers(layer, steps)
        return {name: steps[name] for name in sorted(steps, key=natural)}

    def config(self) -> dict[str, Any]:
        """The output's config.json."""
        assert self.family is not None  # without problems there is one
        stage = self.stage
        sizes = Sizes(len(stage.experts), len(stage.shared), stage.experts_per_token, self.inner)
        return family_config(self.family, self.base.config or {}, sizes)

    def beside(self) -> Iterator[tuple[str, dict[str, Derivation], bool]]:
        """The stages before this one: name, steps, and whether they are kept.

        Hidden states are: they are small, and each is needed for the next.
        """
        for name, drv in self.gates.made.items() if self.gates else ():
            yield name, {STATES: drv}, True
        if self.changed:
            yield self.label, self.changed, False

    def _family(self) -> Family | None:
        """The family that is asked for, else the first that fits; why others do not is noted."""
        stage = self.stage
        config = self.base.config or {}
        if "model_type" not in config:
            message = f"{self.base.label} has no config.json that says its model_type"
            self._fail("KB350", message, hint="give the folder that the model was published in")
            return None
        wanted = named(stage.architecture) if stage.architecture else FAMILIES
        names = ", ".join(family.name for family in FAMILIES)
        if not wanted:
            self._fail("KB350", f"there is no architecture {stage.architecture!r}", hint=f"known: {names}")
            return None
        types = {
            str(ref): str((self.view(ref).config or {}).get("model_type", "unknown")) for ref in stage.references()
        }
        reasons: dict[str, str] = {}
        for family in wanted:
            refused = family.refusals(types, config, len(stage.shared))
            if stage.layout == "fused" and not family.fused:
                refused.append("it has no fused layout")
            if not refused:
                found = [f"not {other}, for {why}" for other, why in reasons.items()]
                self.notes.append(f"{stage.at}: the output is {'; '.join([family.name, *found])}")
                return family
            reasons[family.name] = "; ".join(refused)
        told = "".join(f"\n  {name}: {why}" for name, why in reasons.items())
        self._fail("KB350", f"no family of mixtures of experts fits these models:{told}", hint="change what it names")
        return None

    def _fail(self, code: str, message: str, *, hint: str, at: object = None) -> None:
        self.problems.append(PlanError(code, message, at=str(at or self.stage.at), hint=hint))

    def _check_base(self) -> None:
        """The base is whole, and each of its tensors has a place."""
        stacked = [int(match[1]) for name in self.base.tensors if (match := _LAYER.match(name))]
        self.layers = max(stacked, default=-1) + 1
        if EMBEDDING not in self.base.tensors or not self.layers:
            message = f"{self.base.label} has no {EMBEDDING} or no model.layers"
            self._fail("KB351", message, hint="give a language model as transformers saves it")
        for name in self.base.tensors:
            if ".mlp." in name and not _DENSE.fullmatch(name) and not _ROUTER_OF_ONE.fullmatch(name):
                self._fail(
                    "KB351", f"{self.base.label} has {name}, for which no expert has a place", hint="is it dense?"
                )
            if name.endswith(".bias") and ".self_attn." in name and not self._biased(name):
                family = self.family.name if self.family else ""
                message = f"{self.base.label} has {name}, for which {family} has no place"
                self._fail("KB351", message, hint="choose another `architecture:`")

    def _biased(self, name: str) -> bool:
        return self.family is not None and any(name.endswith(f".{module}.bias") for module in self.family.biased)

    def _matrices(self, expert: Expert) -> Matrices:
        """The MLPs of an expert, each of the base's shape; what is missing or of another shape is noted."""
        view, config = self.view(expert.model), self.base.config or {}
        own, wanted = _dense(view), _dense(self.base)
        self.inner = next((given.spec.shape[0] for key, given in wanted.items() if key[1] == "gate"), 0)
        wrong = []
        for layer in range(self.layers):
            for word in MATRICES:
                given, like = own.get((layer, word)), wanted.get((layer, word))
                if given is None or like is None or given.spec.shape != like.spec.shape:
                    found = [list(one.spec.shape) if one else "nothing" for one in (given, like)]
                    wrong.append(f"the {word} matrix of layer {layer} is {found[0]}, the base's {found[1]}")
        surplus = [key for key in own if key[0] >= self.layers]
        if surplus:
            wrong.append(f"it has {max(layer for layer, _ in own) + 1} layers, the base {self.layers}")
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            message = f"{view.label} cannot be an expert in {self.base.label}: {wrong[0]}{more}"
            self._fail("KB351", message, at=expert.at, hint="experts have the layers and shapes of the base")
        acts = [assumed(c).get("hidden_act") for c in (view.config or {"model_type": ""}, config)]
        if acts[0] != acts[1]:
            message = f"{view.label} has the activation {acts[0]}, the base {acts[1]}"
            self._fail("KB351", message, at=expert.at, hint="experts compute as the base does")
        return own

    def _check_shared(self) -> None:
        """Prompts of shared experts are there where something weighs them, and only there."""
        for expert in self.stage.shared:
            if self.family and self.family.shared_gate and self.stage.prompted and not expert.positive:
                message = f"the shared expert {expert.model} has no positive_prompts, and {self.family.name} weighs it"
                self._fail("KB354", message, at=expert.at, hint="give it some: prompts for which it is always of use")
            elif self.family and not self.family.shared_gate and expert.positive:
                self.notes.append(f"{expert.at}: {self.family.name} does not weigh shared experts: no prompt is needed")

    def _note_counts(self) -> None:
        stage, count = self.stage, len(self.stage.experts)
        if count & (count - 1):
            self.notes.append(f"{stage.at}: {count} experts: llama.cpp wants a power of two")
        if len({expert.model for expert in stage.experts}) == 1 and not any(e.noise for e in stage.experts):
            self.notes.append(
                f"{stage.at}: all experts are {stage.experts[0].model}: the output is of use for training"
            )

    def _of_base(self) -> dict[str, Step]:
        """Everything but the MLPs, and the biases that the family has and the base lacks."""
        steps: dict[str, Step] = {}
        for name, given in self.base.tensors.items():
            if ".mlp." not in name and not name.endswith(".rotary_emb.inv_freq"):
                steps[name] = self._taken(given, given.spec.dtype)
        assert self.family is not None  # else there are no steps
        for module in self.family.biased:
            for layer in range(self.layers):
                name = f"model.layers.{layer}.{module}"
                if f"{name}.bias" not in steps and f"{name}.weight" in steps:
                    like = steps[f"{name}.weight"].spec
                    output = TensorSpec(like.dtype, like.shape[:1])
                    steps[f"{name}.bias"] = Derivation("zeros", self.builders["zeros"].version, {}, (), output)
        return steps

    def _mlps(self, layer: int, experts: list[Matrices], shared: list[Matrices], steps: dict[str, Step]) -> None:
        """The matrices of a layer's experts."""
        family, start = self.family, f"model.layers.{layer}."
        assert family is not None  # else there are no steps
        if self.stage.layout == "fused":
            for whole, words in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
                steps[f"{start}mlp.experts.{whole}"] = self._stacked(layer, experts, words)
        else:
            for number, (expert, matrices) in enumerate(zip(self.stage.experts, experts, strict=True)):
                module = f"{start}{family.experts.format(number)}"
                for word, called in zip(MATRICES, family.words, strict=True):
                    name = f"{module}.{called}.weight"
                    steps[name] = self._matrix(expert, matrices, layer, word, f"{layer}.{number}.{word}")
        for expert, matrices in zip(self.stage.shared, shared, strict=True):
            for word in MATRICES:
                name = f"{start}{family.shared}.{word}_proj.weight"
                steps[name] = self._matrix(expert, matrices, layer, word, f"{layer}.shared.{word}")

    def _stacked(self, layer: int, experts: list[Matrices], words: tuple[str, ...]) -> Step:
        """The matrices of all experts of a layer, end to end. Those that are changed first are steps of their own."""
        inputs: list[Input] = []
        for number, (expert, matrices) in enumerate(zip(self.stage.experts, experts, strict=True)):
            for word in words:
                name = f"{layer}.{number}.{word}"
                step = self._matrix(expert, matrices, layer, word, name)
                if isinstance(step, Derivation):
                    self.changed[name] = step
                    step = StageTensor(self.label, name, step.output)
                inputs.append(step)
        rows, columns = inputs[0].spec.shape
        output = TensorSpec(inputs[0].spec.dtype, (len(experts), rows * len(words), columns))
        return Derivation("join", self.builders["join"].version, {}, tuple(inputs), output)

    def _matrix(self, expert: Expert, matrices: Matrices, layer: int, word: str, name: str) -> Step:
        """One matrix: as it is, unless the expert is to be changed. `name`: the same in every family and layout."""
        given, dtype = matrices[layer, word], _dense(self.base)[layer, word].spec.dtype
        factor = expert.residual if word == "down" and expert.residual is not None else 1.0
        if not expert.noise and factor == 1.0:
            return self._taken(given, dtype)
        params: dict[str, Any] = {"noise": expert.noise or 0.0, "factor": factor}
        if expert.noise:
            params |= {"seed": self.seed, "tensor": name}
        output = given.spec.with_dtype(self._dtype(dtype))
        return Derivation("expert", self.builders["expert"].version, params, (given,), output)

    def _taken(self, given: Input, dtype: DType) -> Step:
        """A tensor as it is, in the output's dtype."""
        wanted = self._dtype(dtype)
        if given.spec.dtype is wanted or not given.spec.dtype.is_float:
            return given
        return Derivation("cast", self.builders["cast"].version, {}, (given,), given.spec.with_dtype(wanted))

    def _dtype(self, dtype: DType) -> DType:
        """The dtype of an output tensor where the base's is `dtype`."""
        return self.stage.out_dtype or self.stage.dtype or dtype

    def _routers(self, layer: int, steps: dict[str, Step]) -> None:
        family, start = self.family, f"model.layers.{layer}."
        assert family is not None  # else there are no steps
        assert self.gates is not None
        dtype = self._dtype(self.base.tensors[EMBEDDING].spec.dtype)
        router = "mlp.gate.weight" if self.stage.layout == "fused" else family.router
        steps[start + router] = self.gates.rows(self.stage.experts, layer, f"{start}router", dtype)
        if family.shared_gate:
            steps[start + family.shared_gate] = self.gates.rows(self.stage.shared, layer, f"{start}shared", dtype)


def _dense(view: View) -> Matrices:
    """The MLPs of a dense model, or of a mixture of one expert, which is the same."""
    found = {}
    for name, given in view.tensors.items():
        if match := _DENSE.fullmatch(name):
            found[int(match[1]), match[2]] = given
    return found
