"""An extract_lora stage lowered to a PEFT adapter: of each module one decomposition, and cheap cuts of it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kittybuild.builders.base import Builders
from kittybuild.errors import KittybuildError, PlanError
from kittybuild.model.derivation import Derivation, Input, Step
from kittybuild.model.recipe import ExtractLoraStage
from kittybuild.planner.adapters import PREFIX, Kind, adapter_config
from kittybuild.planner.decomposed import Decomposed, Module, Spectrum, too_small
from kittybuild.planner.machine import Machine
from kittybuild.planner.names import before_layers, is_vocabulary, layer_of, natural
from kittybuild.planner.views import View
from kittybuild.tensors import DType, TensorSpec


@dataclass
class Extraction:
    """What an extraction takes: modules for factors, tensors as they are by the names that the adapter gives them."""

    modules: list[Module] = field(default_factory=list)
    saved: dict[str, Input] = field(default_factory=dict)
    saved_modules: dict[str, None] = field(default_factory=dict)
    biases: dict[str, Input] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


class ExtractLowering:
    """One stage on its way to steps. Where ranks hang on spectra that are not known, the most are taken."""

    def __init__(
        self,
        stage: ExtractLoraStage,
        views: tuple[View, View],
        base_name: str,
        builders: Builders,
        problems: list[KittybuildError],
        *,
        seed: int,
        machine: Machine | None,
        spectra: Mapping[str, Spectrum] | None,
    ) -> None:
        self.stage, self.builders, self.problems = stage, builders, problems
        self.model, self.base = _with_heads(*views)
        self.found = _chosen(stage, self.model, self.base)
        self.tied_table = next((name for name in self.found.saved if _tied(self.base) and is_vocabulary(name)), None)
        if self.tied_table:  # PEFT wants to read both
            head = "embed_out" if "embed_in" in self.tied_table else "lm_head"
            self.found.saved[f"{PREFIX}{head}.weight"] = self.found.saved[self.tied_table]
        self._check()
        self.cut = Decomposed(stage.name, stage.decomposition, builders, seed, machine)
        self.ranks = {module.name: self.cut.rank(module, spectra) for module in self.found.modules}
        self.base_name = base_name
        self.notes: list[str] = []
        if self.found.left_out:
            count, first = len(self.found.left_out), self.found.left_out[0]
            self.notes.append(f"{stage.at}: no adapter can hold {first} and such ({count} tensors): left out")

    def steps(self) -> dict[str, Step]:
        """The adapter's tensors, in natural order."""
        dtype = self.stage.out_dtype or self.stage.dtype
        found: dict[str, Step] = {}
        for module in self.found.modules:
            self.cut.decomposed(module)
            if rank := self.ranks[module.name]:
                found |= self.cut.sides(module, rank, dtype or DType.F32)
        for name, given in {**self.found.saved, **self.found.biases}.items():
            cast = dtype and given.spec.dtype.is_float and given.spec.dtype is not dtype
            spec = given.spec.with_dtype(dtype) if dtype else given.spec
            found[name] = Derivation("cast", self.builders["cast"].version, {}, (given,), spec) if cast else given
        return {name: found[name] for name in sorted(found, key=natural)}

    def config(self) -> dict[str, Any]:
        """adapter_config.json."""
        factored = any(module.kind == "embedding" for module in self.found.modules)
        return adapter_config(
            {name: rank for name, rank in self.ranks.items() if rank},
            base=self.base_name,
            others=_modules(self.base.tensors),
            saved=tuple(self.found.saved_modules),
            biases=bool(self.found.biases),
            transposed=any(m.kind == "linear" and m.transposed for m in self.found.modules),
            tied=bool(_tied(self.base) and (factored or self.tied_table)),
        )

    def _check(self) -> None:
        """Names, shapes and ranks fit; problems are noted."""
        model, base, stage = self.model, self.base, self.stage
        for lacking, having in ((base, model), (model, base)):
            if missing := sorted(having.tensors.keys() - lacking.tensors.keys(), key=natural):
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                self._fail("KB302", f"{lacking.label} has no {missing[0]}{more}, which {having.label} has")
        unequal = [
            name
            for name in model.tensors.keys() & base.tensors.keys()
            if model.tensors[name].spec.shape != base.tensors[name].spec.shape
        ]
        for name in sorted(unequal, key=natural)[:1]:
            sides = model.tensors[name].spec, base.tensors[name].spec
            more = f" (and {len(unequal) - 1} more)" if len(unequal) > 1 else ""
            message = f"{name} is {sides[0]} in {model.label} and {sides[1]} in {base.label}{more}"
            self._fail("KB301", message, "an adapter fits a base of the same shapes: bring vocabularies to one size")
        if not (self.found.modules or unequal):
            what = f"{model.label} has no module that differs from {base.label} and is included"
            self._fail("KB361", what, "look at include and exclude")
        self.problems += too_small(self.found.modules, stage.decomposition.rank, stage.at)

    def _fail(self, code: str, message: str, hint: str | None = None) -> None:
        self.problems.append(PlanError(code, message, at=str(self.stage.at), hint=hint))


def _with_heads(model: View, base: View) -> tuple[View, View]:
    """Both models; where one has a head and the other's is tied to the embeddings, that one's is these."""
    views = [model, base]
    for index, view in enumerate(views):
        other = views[1 - index]
        heads = [name for name in other.tensors.keys() - view.tensors.keys() if is_vocabulary(name)]
        tables = [name for name in view.tensors if is_vocabulary(name) and before_layers(name)]
        if len(heads) == len(tables) == 1:
            tensors = {**view.tensors, heads[0]: view.tensors[tables[0]]}
            views[index] = View(view.label, tensors, view.donor, view.config)
    return views[0], views[1]


def _tied(base: View) -> bool:
    """Whether the head of a model is its embeddings."""
    heads = [name for name in base.tensors if is_vocabulary(name) and not before_layers(name)]
    return bool((base.config or {}).get("tie_word_embeddings")) and not heads


def _modules(names: Iterable[str]) -> frozenset[str]:
    """The modules that tensors belong to."""
    return frozenset(name.rpartition(".")[0] for name in names)


def _chosen(stage: ExtractLoraStage, model: View, base: View) -> Extraction:
    """What is taken of which tensor. Tensors that are the base's own are nobody's difference."""
    found = Extraction()
    names = [name for name in model.tensors if name in base.tensors and model.tensors[name] != base.tensors[name]]
    names = [name for name in sorted(names, key=natural) if model.tensors[name].spec.dtype.is_float]
    saved = set(stage.saved)
    rest = []
    for name in names:
        module, _, last = name.rpartition(".")
        if saved & {module, module.rpartition(".")[2]} and last in ("weight", "bias"):
            _save(found, name, model)
        elif not _included(stage, module):
            continue
        elif kind := _kind(name, model.tensors[name].spec):
            if (kind == "embedding" or is_vocabulary(name)) and stage.embeddings != "lora":
                _save(found, name, model) if stage.embeddings == "save" else None
                continue
            turned = kind == "embedding" or (kind == "linear" and _transposed(stage, base))
            given = model.tensors[name], base.tensors[name]
            found.modules.append(Module.of_weights(module, kind, given, transposed=turned))
        else:
            rest.append(name)
    factored = {module.name for module in found.modules}
    for name in rest if stage.others == "save" else ():
        module, _, last = name.rpartition(".")
        if last == "bias" and module in factored:
            found.biases[f"{PREFIX}{module}.base_layer.bias"] = model.tensors[name]
        elif last in ("weight", "bias"):
            _save(found, name, model)
        else:
            found.left_out.append(name)
    return found


def _save(found: Extraction, name: str, model: View) -> None:
    found.saved[f"{PREFIX}{name}"] = model.tensors[name]
    found.saved_modules[name.rpartition(".")[0]] = None


def _included(stage: ExtractLoraStage, module: str) -> bool:
    if any(re.search(pattern, module) for pattern in stage.exclude):
        return False
    return not stage.include or any(re.search(pattern, module) for pattern in stage.include)


def _kind(name: str, spec: TensorSpec) -> Kind | None:
    """What a weight is, as far as factors can hold it: convolutions in groups are none of these."""
    if not name.endswith(".weight") or len(spec.shape) < 2:
        return None
    if len(spec.shape) > 2:
        return "conv" if spec.shape[1] > 1 else None
    return "embedding" if before_layers(name) and layer_of(name) is None else "linear"


def _transposed(stage: ExtractLoraStage, base: View) -> bool:
    """Whether linear layers keep their weights as [in, out], as those of GPT-2 do."""
    if stage.transposed is not None:
        return stage.transposed
    return (base.config or {}).get("model_type") in ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
