"""The pins of a finished build's sources, from what became known of them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from kittybuild import __version__
from kittybuild.checkpoint.opening import package_version
from kittybuild.digest import tagged
from kittybuild.model.derivation import SourceTensor
from kittybuild.model.lock import Pin
from kittybuild.model.recipe import SourceDecl
from kittybuild.planner.known import Known

BUILT_WITH = ("torch", "numpy", "safetensors", "blake3")


def versions() -> dict[str, str]:
    """The versions of the packages that a build runs with, without starting them."""
    return {"kittybuild": __version__, **{name: package_version(name) for name in BUILT_WITH}}


def pins(known: Known, decls: Mapping[str, SourceDecl]) -> dict[str, Pin]:
    """One pin for each source, in the recipe's order."""
    read: dict[str, list[list[object]]] = {}
    for given, ref in known.contents():
        if isinstance(given, SourceTensor):
            read.setdefault(given.source, []).append([given.name, *ref.to_json()])
    found = {}
    for name, checkpoint in known.sources.checkpoints.items():
        decl = decls[name]
        words = {"path": decl.path}
        if decl.package:
            words = {"package": decl.package, "version": package_version(decl.package), "file": decl.path}
        quantized = tuple(sorted(checkpoint.quantized.items()))
        files = tuple((os.path.basename(file.path), file.size) for file in checkpoint.files)
        tensors = sorted(read.get(name, []), key=lambda item: str(item[0]))
        found[name] = Pin(words, files, tagged("kittybuild.pin.v1", tensors), len(tensors), quantized)
    return found
