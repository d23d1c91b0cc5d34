"""The texts of an output folder: model card, the recipe, and kittybuild.json with manifest, lock and versions.

They hold names that others can follow, never a path outside the recipe's own words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from kittybuild import __version__
from kittybuild.digest import Digest
from kittybuild.model.manifest import Manifest
from kittybuild.model.method import Method, find
from kittybuild.model.recipe import (
    ExtractLoraStage,
    MergeAdaptersStage,
    MergeStage,
    MoeStage,
    Recipe,
    Stage,
    TransplantStage,
)
from kittybuild.publish.folder import ATTESTATION, INDEX, PROVENANCE, shard_names

MERGEKIT = "mergekit_config.yml"
MERGEKIT_MOE = "mergekit_moe_config.yml"


def folder_texts(
    recipe: Recipe,
    stage: str,
    manifest: Manifest,
    record: Mapping[str, Any],
    folder: str,
    methods: Sequence[Method],
    signed: bool = False,
) -> dict[str, bytes]:
    """README.md, the recipe as it was written, and kittybuild.json.

    `record`: the build's lock and derivations. `signed`: an attestation will be put there, too.
    """
    texts = {"README.md": card(recipe, stage, folder, methods).encode()}
    if recipe.dialect == "mergekit" and len(recipe.stages) == 1:
        moe = isinstance(recipe.stages[stage], MoeStage)
        texts[MERGEKIT_MOE if moe else MERGEKIT] = recipe.text.encode()
    listed = [file.name for file in manifest.files] + list(texts) + list(shard_names(manifest))
    if len(manifest.shards) > 1:
        listed.append(INDEX)
    if signed:
        listed.append(ATTESTATION)
    provenance = {
        "kittybuild": __version__,
        "format": 2,
        "stage": stage,
        "root": manifest.root.hex,
        "manifest_digest": manifest.digest.hex,
        "files": sorted([*listed, PROVENANCE]),
        "texts": {name: Digest.of(text).hex for name, text in texts.items()},
        "recipe": {"dialect": recipe.dialect, "numerics": recipe.numerics, "text": recipe.text},
        "lock": record["lock"],
        "manifest": json.loads(manifest.to_bytes()),
        "derivations": behind(stage, record["derivations"]),
    }
    texts[PROVENANCE] = (json.dumps(provenance, indent=1, ensure_ascii=False) + "\n").encode()
    return texts


def behind(stage: str, derivations: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of all derivations of a build, those of a stage and of what they are made of; other outputs are not told of."""
    found: dict[str, dict[str, Any]] = {}
    todo = [(stage, name) for name in derivations.get(stage, {})]
    while todo:
        of, name = todo.pop()
        made = derivations.get(of, {}).get(name)
        if made is not None and name not in found.setdefault(of, {}):
            found[of][name] = made
            todo += [(given[0], given[1]) for given in made[-1]]
    return {of: {name: made for name, made in derivations[of].items() if name in found[of]} for of in found}


def card(recipe: Recipe, stage: str, folder: str, methods: Sequence[Method]) -> str:
    """The model card, in the form that the Hub and its bots read."""
    named = _models(recipe, recipe.stages[stage])
    # The Hub wants names of its own models here, and our sources are files: a path may look like such a name.
    front = [
        "---",
        "base_model: []",
        "library_name: transformers",
        "tags:",
        "- mergekit",
        "- merge",
        "- kittybuild",
        "---",
    ]
    title = os.path.basename(os.path.abspath(folder)) or recipe.name
    lines = [
        *front,
        f"# {title}",
        "",
        "A merge built with kittybuild: every tensor is what the recipe below says, bit for bit.",
        "",
    ]
    lines += ["## How it was made", ""]
    lines += [
        f"- `{name}`: {_sentence(step, methods)}"
        for name, step in recipe.stages.items()
        if _needed(recipe, stage, name)
    ]
    lines += ["", "## Models", ""] + [f"- {name}" for name in named]
    lines += ["", "## Configuration", "", "```yaml", recipe.text.rstrip("\n"), "```", ""]
    lines += ["`kittybuild.json` lists the digest and the derivation key of every tensor.", ""]
    return "\n".join(lines)


def _needed(recipe: Recipe, wanted: str, name: str) -> bool:
    return name == wanted or any(
        _needed(recipe, part.model, name)
        for ref in recipe.stages[wanted].references()
        for part in ref.parts()
        if part.model in recipe.stages
    )


def _models(recipe: Recipe, stage: Stage) -> list[str]:
    """The sources behind a stage, in the order of the text."""
    found: dict[str, None] = {}
    for ref in [part for named in stage.references() for part in named.parts()]:
        if ref.model in recipe.stages:
            found.update(dict.fromkeys(_models(recipe, recipe.stages[ref.model])))
        else:
            found[str(ref)] = None
    return list(found)


def _sentence(stage: Stage, methods: Sequence[Method]) -> str:
    if isinstance(stage, MergeStage):
        method = find(methods, stage.method)
        title = method.title if method else stage.method
        linked = f"[{title}]({method.paper})" if method and method.paper else title
        on = f" on `{stage.base}`" if stage.base else ""
        return f"{linked} of {', '.join(f'`{ref}`' for ref in stage.references() if ref != stage.base)}{on}"
    if isinstance(stage, TransplantStage):
        way = stage.approximation.approximation_method
        return f"`{stage.model}` with the tokenizer of `{stage.donor}`; rows of new tokens by {way}"
    if isinstance(stage, MoeStage):
        experts = ", ".join(f"`{expert.model}`" for expert in (*stage.experts, *stage.shared))
        return f"mixture of the experts {experts} in `{stage.base}`, gated by {stage.gate_mode}"
    if isinstance(stage, ExtractLoraStage):
        rank = stage.decomposition.rank
        most = rank.most if rank.exact else f"at most {rank.most}"
        return f"LoRA of rank {most}: what `{stage.model}` adds to `{stage.base}`"
    added = ", ".join(f"`{use.adapter}` × {use.weight:g}" for use in stage.adapters)
    if isinstance(stage, MergeAdaptersStage):
        return f"LoRA of {added}, merged by {stage.method}"
    return f"LoRA {added} on `{stage.base}`"
