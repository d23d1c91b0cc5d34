"""Flipped bits and cuts in every kind of file of a store: found by check, repaired, and the next build is right."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kittybuild.store.check import Extent
from kittybuild.store.store import Store
from tests.building import build, contents
from tests.faults import THREE, UnsyncedDisk, assert_sound, manifest_of, put_pack, quick_folder, sample
from tests.helpers import noise, run_cli, write_model, write_recipe

SHAPES = {"model.embed.weight": (64, 64), "model.layers.0.weight": (64, 64), "model.norm.weight": (16,)}
KINDS = ("packs", "files", "manifests", "roots", "index")


@pytest.fixture(scope="module")
def top() -> Iterator[Path]:
    """A folder with two sources and a recipe of three stages and two outputs."""
    with quick_folder() as top:
        for seed, name in enumerate(("base", "happy")):
            tensors = {tensor: noise(seed, tensor, shape) for tensor, shape in SHAPES.items()}
            write_model(top / name, tensors, {"model_type": "pico", "torch_dtype": "float32"})
        models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "happy")]
        form = {
            "kittybuild": 1,
            "sources": {name: {"path": str(top / name)} for name in ("base", "happy")},
            "stages": {
                "soup": {"merge_method": "linear", "models": models},
                "bf16": {"merge_method": "passthrough", "models": [{"model": "soup"}], "dtype": "bfloat16"},
                "half": {"merge_method": "passthrough", "models": [{"model": "soup"}], "dtype": "float16"},
            },
            "outputs": {"bf16": {"folder": "place/out", "shard_size": "10000"}, "half": {"folder": "place/half"}},
        }
        write_recipe(top, form, "recipe.yml")
        yield top


@pytest.fixture
def place(top: Path) -> Iterator[Path]:
    """Both outputs, built, and the store beside them."""
    made(top)
    yield top / "place"
    shutil.rmtree(top / "place")


def made(top: Path) -> dict[str, Any]:
    return build(top / "recipe.yml", "--store", top / "place/store", "--workers", "threads")


def outputs(place: Path) -> dict[str, dict[str, bytes]]:
    return {name: contents(place / name) for name in ("out", "half")}


def files_of(kind: str, place: Path) -> list[Path]:
    found = sorted(path for path in (place / "store" / kind).rglob("*") if path.is_file())
    return [path for path in found if kind != "index" or path.name == "cache.db"]


def overwrite(path: Path, data: bytes) -> None:
    """In place, as a bad disk would: under all names of the file."""
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


def checked(place: Path, *args: str) -> tuple[int, dict[str, Any]]:
    return run_cli("store", "check", "--store", place / "store", *args)


def settle_index(place: Path) -> None:
    """All of the index in its one file, as it is when the last process has closed it in peace."""
    with sqlite3.connect(place / "store/index/cache.db") as base:
        base.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    base.close()


def harm(data: bytes, how: str) -> bytes:
    return flipped(data, len(data) * 2 // 3) if how == "flip" else data[: len(data) // 2]


@pytest.mark.parametrize("how", ["flip", "cut"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "index"])
def test_damage_is_found_repaired_and_the_next_build_is_right(kind: str, how: str, place: Path, top: Path) -> None:
    whole = outputs(place)
    for number in range(len(files_of(kind, place))):
        path = files_of(kind, place)[number]
        overwrite(path, harm(path.read_bytes(), how))
        status, answer = checked(place, "--full")
        assert (status, answer["ok"], answer["errors"][0]["code"]) == (7, False, "KB706"), path
        assert {damage["kind"] for damage in answer["damage"]} == {kind.removesuffix("s")}, path
        assert any(damage["path"] == str(path) for damage in answer["damage"])
        status, answer = run_cli("store", "repair", "--store", place / "store", "--full")
        if kind == "roots":
            assert status == 0, answer
        again = made(top)
        assert checked(place, "--full")[0] == 0, path
        assert outputs(place) == whole, path
        assert again["ok"]
        assert_sound(str(place / "store"))


@pytest.mark.parametrize("how", ["flip", "cut", "rows"])
def test_a_damaged_index_is_made_anew(how: str, place: Path, top: Path) -> None:
    whole = outputs(place)
    settle_index(place)
    path = place / "store/index/cache.db"
    if how == "rows":
        with sqlite3.connect(path) as base:
            base.execute("UPDATE Cache SET value = zeroblob(40) WHERE key LIKE 'realisation:%'")
        base.close()
    elif how == "cut":
        overwrite(path, path.read_bytes()[: path.stat().st_size // 2])
    else:
        data = path.read_bytes()
        for page in range(4096, len(data), 4096):  # the kind of each page but the first
            data = flipped(data, page)
        overwrite(path, data)
    status, answer = checked(place)
    moved = list((place / "store/tmp").glob("damaged-index-*"))  # so bad that it was seen when it was opened
    assert status == 7 or moved, answer
    run_cli("store", "repair", "--store", place / "store")
    assert checked(place, "--full")[0] == 0
    assert made(top)["ok"]
    assert outputs(place) == whole
    assert_sound(str(place / "store"))


def test_a_flipped_bit_is_found_by_the_fast_check_at_any_place(place: Path) -> None:
    for path in files_of("packs", place):
        whole = path.read_bytes()
        for at in (*range(0, 4096, 257), *range(4096, len(whole), 1021), len(whole) - 1):
            overwrite(path, flipped(whole, at))
            with Store.open(str(place / "store"), disk=UnsyncedDisk()) as store:
                assert [damage.path for damage in store.check().damage] == [str(path)], at
            overwrite(path, whole)


def test_repair_builds_the_hurt_outputs_from_their_recipe(place: Path) -> None:
    whole = outputs(place)
    for path in files_of("packs", place):
        if path.stat().st_nlink > 1:
            overwrite(path, flipped(path.read_bytes(), 4100))
    assert outputs(place) != whole
    status, answer = run_cli("store", "repair", "--store", place / "store")
    assert (status, answer["ok"], answer["hurt"]) == (0, True, []), answer
    assert sorted(built["output"] for built in answer["built"]) == ["bf16", "half"]
    assert outputs(place) == whole
    assert checked(place, "--full")[0] == 0


def test_repair_names_the_outputs_that_it_cannot_make(place: Path, top: Path) -> None:
    path = next(path for path in files_of("packs", place) if path.stat().st_nlink > 1)
    overwrite(path, flipped(path.read_bytes(), 4100))
    os.rename(top / "recipe.yml", top / "gone.yml")
    try:
        status, answer = run_cli("store", "repair", "--store", place / "store")
    finally:
        os.rename(top / "gone.yml", top / "recipe.yml")
    assert (status, {error["code"] for error in answer["errors"]}) == (7, {"KB712"})
    assert all(hurt["folder"].startswith(str(place)) for hurt in answer["hurt"])
    assert made(top)["ok"]
    assert checked(place, "--full")[0] == 0


def test_a_damaged_pack_is_put_together_from_good_copies(tmp_path: Path) -> None:
    with Store.open(str(tmp_path / "store"), disk=UnsyncedDisk()) as store:
        pack, copy = put_pack(store, THREE), put_pack(store, [*THREE, sample("more")])
        store.put_file(b'{"model_type": "pico"}')
        store.set_root("calm", "/out", store.put_manifest(manifest_of(pack, THREE)))
        whole = Path(pack.path).read_bytes()
        overwrite(Path(pack.path), flipped(whole, 5000))
        done = store.repair()
        assert (done.whole, [root.name for root in done.hurt]) == ((pack.digest,), ["calm"])
        assert Path(pack.path).read_bytes() == whole
        os.unlink(copy.path)
        os.unlink(pack.path)
        assert store.repair().whole == ()
        assert [damage.what for damage in store.check().damage] == ["a pack that is gone"]
        assert store.info().tmp_bytes == 0


def test_what_was_not_checked_for_longest_comes_first(tmp_path: Path) -> None:
    samples = [sample(f"s{n}", shape=(2000,)) for n in range(4)]
    with Store.open(str(tmp_path / "store"), disk=UnsyncedDisk()) as store:
        paths = [Path(put_pack(store, [s]).path) for s in samples]
        seen = set()
        for now in range(1000, 1004):
            done = store.check(Extent(sample=0.25, now=float(now)))
            assert (done.packs, done.left) == (1, 3)
        for path in paths:
            overwrite(path, flipped(path.read_bytes(), 5000))
        for now in range(2000, 2004):  # what is damaged is not noted as checked, and comes again
            (damage,) = store.check(Extent(sample=0.25, now=float(now))).damage
            seen.add(damage.path)
            store.discard(damage.path)
        assert seen == {str(path) for path in paths}
        pack = put_pack(store, THREE)
        store.check(Extent(now=5000.0))
        assert store.check(Extent(now=5010.0, older_than=60.0)).packs == 0
        assert store.check(Extent(now=5010.0, older_than=60.0, full=True)).packs == 1
        assert store.pack(pack.digest)


def test_the_quick_check_believes_no_row_of_the_index_over_the_bytes(tmp_path: Path) -> None:
    """Where XXH3 is not known, as after the index was lost, the digest decides."""
    with Store.open(str(tmp_path / "store"), disk=UnsyncedDisk()) as store:
        path = Path(put_pack(store, THREE).path)
    shutil.rmtree(tmp_path / "store/index")
    overwrite(path, flipped(path.read_bytes(), 5000))
    with Store.open(str(tmp_path / "store"), disk=UnsyncedDisk()) as store:
        assert [damage.kind for damage in store.check().damage] == ["pack"]
