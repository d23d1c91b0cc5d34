"""Whatever bytes lie in a cache, a store, or a file of keys or settings: a value, absent, or an error with a code."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import zstandard

from kittybuild.checkpoint.sources.hub import told_pin
from kittybuild.checkpoint.sources.web import Web
from kittybuild.cli.settings import project_settings
from kittybuild.digest import Digest, canonical
from kittybuild.model.manifest import Manifest
from kittybuild.publish.attest import trusted_keys
from kittybuild.store.journal import read_journal
from kittybuild.store.pack import read_pack_header
from kittybuild.store.remote.bucket import Listed, Piece, Unreachable
from kittybuild.store.remote.cache import GROUPED, RAW, ZSTD, Cache
from kittybuild.store.remote.claims import (
    Output,
    Refused,
    SourceFacts,
    _message,
    outputs_claim,
    outputs_of,
    source_claim,
    source_of,
    stage_key,
)
from kittybuild.store.remote.keys import SigningKey
from kittybuild.store.remote.packed import packed
from kittybuild.store.remote.roots import Root, all_roots
from kittybuild.store.store import Store
from kittybuild.tensors import DType, TensorRef, TensorSpec
from tests.building import build, linear
from tests.foreign import BYTES, FRAMED, JSON, Foreign
from tests.helpers import pico_llama

KEY = SigningKey("team-1", bytes(range(32)))
OUTPUTS = [
    Output(Digest.of(bytes([n])), TensorRef(Digest.of(b"t"), TensorSpec(DType.BF16, (2, 3))), 5) for n in range(2)
]
STAGE = stage_key(output.key for output in OUTPUTS)
FACTS = SourceFacts(100, None, (Digest.of(b"h"), 10), {"10+90": Digest.of(b"t")})
SHA256 = "ab" * 32
ROOT = Root("soup", "team-1", frozenset([STAGE]), {"stages": frozenset([STAGE.hex])})
WEIGHTS = bytes(range(256)) * 16


@dataclass(frozen=True)
class One:
    """A bucket in which every object has the bytes of one file."""

    path: Path
    where: str = "one"

    def read(self, name: str, start: int = 0, length: int = 1 << 20) -> Piece | None:
        data = self.path.read_bytes()
        return Piece(memoryview(data)[start : start + length], len(data))

    def put(self, name: str, data: memoryview) -> None:
        raise AssertionError("nothing is written by who reads")

    def head(self, name: str) -> Listed | None:
        return Listed(name, self.path.stat().st_size, 0.0)

    def list(self, folder: str) -> Iterator[Listed]:
        return iter(())

    def delete(self, name: str) -> None:
        raise AssertionError("nothing is deleted by who reads")


def holding(data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / "x").write_bytes(data)


def signed(kind: str, about: str, data: bytes) -> bytes:
    """What a signer says who may be anybody: the JSON as it is, with a right signature where there can be one."""
    try:
        form = json.loads(data)
        form.pop("signature", None)
        return canonical({**form, "signature": KEY.sign(_message(kind, form))})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


def claimed(kind: str) -> Callable[[Path], object]:
    def parse(folder: Path) -> None:
        data = (folder / "x").read_bytes()
        for text in (data, signed(kind, "", data)):
            with suppress(Refused):
                if kind == "sources":
                    assert source_of(SHA256, text, KEY.public).size >= 0
                else:
                    assert all(output.ref.spec.nbytes >= 0 for output in outputs_of(kind, STAGE, text, KEY.public))

    return parse


def told(folder: Path) -> None:
    cache = Cache.open(One(folder / "x"))
    assert set(cache.forms) <= {RAW, ZSTD, GROUPED}
    cache.has(Digest.of(b""), 1)


def blob(form: str) -> Callable[[Path], object]:
    def parse(folder: Path) -> None:
        found = Cache(One(folder / "x"), (form,)).blob(Digest.of(WEIGHTS), len(WEIGHTS))
        assert found is not None
        assert sum(len(part) for part in found) <= len(WEIGHTS)

    return parse


def kept(folder: Path) -> None:
    all_roots(Rooted(folder / "x"))


class Rooted(One):
    """A bucket with nothing but this root."""

    def list(self, folder: str) -> Iterator[Listed]:
        return iter([Listed(ROOT.place, 1, 0.0)])


class Answered(Web):
    """The Hub, whose answer is in a file; it is read as the client reads it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def client(self) -> Answered:
        return self

    def model_info(self, repository: str, **_: object) -> object:
        from huggingface_hub.hf_api import ModelInfo

        return ModelInfo(**json.loads(self.path.read_bytes()))


LFS = {"size": 10, "sha256": SHA256, "pointerSize": 130}
REPOSITORY = {
    "id": "org/base",
    "sha": "ab" * 20,
    "createdAt": "2024-01-01T00:00:00.000Z",
    "siblings": [
        {"rfilename": "model.safetensors", "size": 10, "blobId": "cd" * 20, "lfs": LFS},
        {"rfilename": "config.json", "size": 2, "blobId": "ef" * 20},
    ],
}


def stored(folder: Path) -> None:
    base = pico_llama(folder / "base", 0, layers=1, width=8)
    other = pico_llama(folder / "other", 1, base=base)
    build(linear(folder, {base: 0.5, other: 0.5}), "-o", folder / "out", "--store", folder / "store")


PACK, MANIFEST = "store/packs/*/*.safetensors", "store/manifests/*/*.json"


def manifest(folder: Path) -> object:
    return Manifest.from_bytes(next(folder.glob(MANIFEST)).read_bytes()).root


def root(folder: Path) -> None:
    """Every root of a store, one of them a stranger's."""
    with Store.open(str(folder / "store")) as store:
        store.roots()
        store.used_by()


def journal(folder: Path) -> None:
    from kittybuild.store.journal import Finished, first_line

    spec = TensorSpec(DType.F32, (2, 3))
    line = Finished("x", TensorRef(Digest.of(b"t"), spec), "0" * 16, Digest.of(b"k")).line()
    (folder / "x").write_bytes(first_line([("x", spec), ("y", spec)]) + line)


def row(folder: Path) -> None:
    """A row of the index that says anything, with the checksum that it must have."""
    from kittybuild.store.index import _checksum

    data = (folder / "x").read_bytes()
    key = "0" * 64
    base = sqlite3.connect(folder / "store/index/cache.db")
    with base:
        for kind in ("realisation", "location", "memo", "shortcut", "nonfinite", "cost", "pack", "used", "checked"):
            name = f"{kind}:{key}"
            value = _checksum(name, data) + b" " + data
            base.execute("DELETE FROM Cache WHERE key = ?", (name,))
            base.execute("INSERT INTO Cache (key, raw, store_time, mode, value) VALUES (?, 1, 0, 1, ?)", (name, value))
    base.close()
    digest = Digest(key)
    with Store.open(str(folder / "store")) as store:
        store.realisation(digest)
        store.locations([digest])
        store.costs([digest])
        store.info()
        store.used_by()


TABLE = (
    Foreign("claim about a stage", "x", JSON, holding(outputs_claim("stages", STAGE, OUTPUTS, KEY)),
            claimed("stages"), 150),
    Foreign("claim about a source", "x", JSON, holding(source_claim(SHA256, FACTS, KEY)), claimed("sources"), 150),
    Foreign("a cache about itself", "x", JSON, holding(canonical({"kittybuild.cache": 1, "blobs": ["raw"]})), told, 150,
            (Unreachable,)),
    Foreign("a root of a cache", "x", JSON, holding(ROOT.to_bytes()), kept, 150),
    Foreign("compressed blob", "x", BYTES, holding(zstandard.compress(WEIGHTS)), blob(ZSTD), 150, (Unreachable,)),
    Foreign("grouped blob", "x", BYTES, holding(bytes(packed(memoryview(WEIGHTS), 2))), blob(GROUPED), 150,
            (Unreachable,)),
    Foreign("public keys", "x", BYTES, holding(str(KEY.public).encode()), lambda f: trusted_keys([str(f / "x")]), 150),
    Foreign("secret key", "x", BYTES, lambda f: KEY.write(str(f / "x")), lambda f: SigningKey.read(str(f / "x")), 150),
    Foreign("answer of the Hub", "x", JSON, holding(json.dumps(REPOSITORY).encode()),
            lambda f: told_pin({"hub": "org/base"}, Answered(f / "x")), 150),
    Foreign("settings", "kittybuild.yml", JSON, lambda f: (f / "kittybuild.yml").write_text(
        json.dumps({"store": "x", "substituters": ["s3://x", "y"], "trusted": []})), lambda f: project_settings(
            str(f / "recipe.yml")), 150),
    Foreign("pack", PACK, FRAMED, stored, lambda f: read_pack_header(str(next(f.glob(PACK))))),
    Foreign("manifest", MANIFEST, JSON, stored, manifest, 60, (ValueError,)),
    Foreign("root", "store/roots/*.json", JSON, stored, root, 60, (), True),
    Foreign("journal", "x", BYTES, journal, lambda f: read_journal(str(f / "x")), 150),
    Foreign("FORMAT", "store/FORMAT", BYTES, stored, root, 60, (), True),
    Foreign("row of the index", "x", JSON, lambda f: (stored(f), holding(b'["x", [1, {"a": 2}], null]')(f)),
            row, 60, (), True),
)  # fmt: skip


@pytest.mark.parametrize("foreign", TABLE, ids=str)
def test_any_bytes_are_a_value_or_an_error(foreign: Foreign, tmp_path: Path) -> None:
    foreign.tried(tmp_path)
