"""extraction.json beside an extracted adapter: how much of each module's difference it keeps."""

from __future__ import annotations

import json
import math

from kittybuild.errors import BuildError
from kittybuild.model.derivation import Derivation, StageTensor
from kittybuild.model.manifest import ManifestFile
from kittybuild.model.plan import StagePlan
from kittybuild.planner.decomposed import Spectrum
from kittybuild.planner.known import Known
from kittybuild.planner.spectra import known_spectra
from kittybuild.store.store import Store

REPORT = "extraction.json"


def extraction_files(stage: StagePlan, known: Known, store: Store) -> tuple[ManifestFile, ...]:
    """The report of a stage whose factors are cut from decompositions; of others nothing."""
    name = f"{stage.name}/spectra"
    if name not in known.plan.stages:
        return ()
    found = known_spectra(known, (name,))
    if found is None:
        raise BuildError("KB506", f"the store has lost singular values of {stage.name}", hint="build again")
    text = json.dumps(report(found[name], ranks(stage)), indent=1, ensure_ascii=False) + "\n"
    data = text.encode()
    return (ManifestFile(REPORT, store.put_file(data), len(data)),)


def ranks(stage: StagePlan) -> dict[str, int]:
    """The rank of each module that has factors."""
    found = {}
    for step in stage.steps.values():
        if isinstance(step, Derivation) and step.builder == "lora_side" and isinstance(step.inputs[0], StageTensor):
            found[step.inputs[0].name] = int(step.params["rank"])
    return found


def report(spectra: dict[str, Spectrum], ranks: dict[str, int]) -> dict[str, object]:
    """Share of the sum of squares that is kept, and norm of the rest: of all modules together, and of each."""
    modules, totals, rests = {}, [], []
    for module, spectrum in spectra.items():
        rank = ranks.get(module, 0)
        total = spectrum[0][0] ** 2 + spectrum[0][1] ** 2
        rest = spectrum[rank - 1][1] ** 2 if rank else total
        totals.append(total)
        rests.append(rest)
        modules[module] = {"rank": rank, "kept_energy": _kept(rest, total), "residual_norm": math.sqrt(rest)}
    total, rest = math.fsum(totals), math.fsum(rests)
    return {"kept_energy": _kept(rest, total), "residual_norm": math.sqrt(rest), "modules": modules}


def _kept(rest: float, total: float) -> float:
    return 1.0 - rest / total if total else 1.0
