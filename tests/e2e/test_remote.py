"""Two machines and a cache in a folder: what is shared, whom is believed, and what poison does."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from kittybuild.digest import Digest
from kittybuild.store.remote.claims import Output, outputs_claim
from kittybuild.store.remote.keys import SigningKey
from kittybuild.store.store import Store
from kittybuild.tensors import DType, TensorRef, TensorSpec
from tests.building import ROOT, build, contents, fails, linear
from tests.caches import Machine, counts, edited, machine, signer, spoil
from tests.helpers import load_tensors, run_cli

NOTHING = (0, 0)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("keys")
    return {name: signer(folder, name) for name in ("team-1", "other-1", "mallory-1")}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, tuple[Path, str]]) -> tuple[Machine, Path]:
    """A machine that built everything, and the cache that it pushed to."""
    one = machine(tmp_path_factory.mktemp("one"))
    one.build()
    cache = tmp_path_factory.mktemp("cache")
    one.push(cache, keys["team-1"][0])
    return one, cache


@pytest.fixture
def cache(pushed: tuple[Machine, Path], tmp_path: Path) -> Path:
    """A cache to be spoiled."""
    return Path(shutil.copytree(pushed[1], tmp_path / "cache"))


@pytest.fixture
def second(pushed: tuple[Machine, Path], tmp_path: Path) -> Machine:
    """A machine with the weights."""
    return pushed[0].like(tmp_path / "two", weights=True)


@pytest.fixture
def ask(cache: Path, keys: dict[str, tuple[Path, str]]) -> tuple[str | Path, ...]:
    return "--substituter", cache, "--trust", keys["team-1"][1], "--fetch", "always"


def same(one: Machine, two: Machine) -> bool:
    return all(
        (one.out / name / "model.safetensors").read_bytes() == (two.out / name / "model.safetensors").read_bytes()
        for name in ("soup", "copy")
    )


class TestPlanned:
    """What `plan` and `why` say is what `build` then does."""

    def planned(self, two: Machine, *args: str | Path, command: str = "plan") -> dict[str, Any]:
        status, document = run_cli(command, two.recipe, "--store", two.store, *args)
        assert status == 0, document
        return document

    def test_what_caches_hold_is_fetched(
        self, pushed: tuple[Machine, Path], tmp_path: Path, ask: tuple[str | Path, ...]
    ) -> None:
        two = pushed[0].like(tmp_path / "two", weights=False)
        plan = self.planned(two, *ask)
        soup = plan["stages"]["soup"]
        assert (soup["computed"], soup["fetched"], soup["there"]) == (0, 12, 0)
        sizes = sum(tensor.nbytes for tensor in load_tensors(pushed[0].out / "soup").values())
        assert soup["fetched_bytes"] == sizes
        assert plan["download"] == sum(stage["fetched_bytes"] for stage in plan["stages"].values())
        why = self.planned(two, *ask, command="why")["outputs"]["soup"]
        assert (why["computed"], why["fetched"], why["last"]) == (0, 12, None)
        document = two.build(*ask)
        for name, stage in plan["stages"].items():
            assert counts(document, name) == (stage["computed"], stage["fetched"]), name
        assert self.planned(two, *ask)["stages"]["soup"]["there"] == 12

    def test_one_request_answers_for_a_stage(
        self, pushed: tuple[Machine, Path], tmp_path: Path, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:
        shutil.rmtree(cache / "traces")
        plan = self.planned(pushed[0].like(tmp_path / "two", weights=False), *ask)
        assert [plan["stages"][name]["fetched"] for name in ("soup", "copy")] == [12, 12]

    def test_who_is_not_trusted_is_not_counted_on(self, second: Machine, cache: Path) -> None:
        plan = self.planned(second, "--substituter", cache)
        assert (plan["stages"]["soup"]["computed"], plan["stages"]["soup"]["fetched"]) == (12, 0)
        assert not second.store.exists()

    def test_an_audit_computes_what_could_be_fetched(self, second: Machine, ask: tuple[str | Path, ...]) -> None:
        """The contents of the sources must be known, or nobody can ask."""
        second.build("copy")
        plan = self.planned(second, "copy", *ask, "--audit", "100")
        assert plan["stages"]["copy"]["fetched"] == 0


class TestShared:
    def test_without_the_weights_everything_is_fetched_and_nothing_computed(
        self, pushed: tuple[Machine, Path], tmp_path: Path, ask: tuple[str | Path, ...]
    ) -> None:
        two = pushed[0].like(tmp_path / "two", weights=False)
        document = two.build(*ask)
        assert counts(document) == (0, 12)
        assert counts(document, "copy") == (0, 12)
        assert counts(document, "glad") == NOTHING
        assert document["bytes"]["read"] == 0
        assert same(pushed[0], two)
        again = two.build(*ask)
        assert [counts(again, name) for name in ("soup", "copy")] == [NOTHING, NOTHING]

    def test_without_any_file_of_the_sources_too(
        self, pushed: tuple[Machine, Path], tmp_path: Path, ask: tuple[str | Path, ...]
    ) -> None:
        two = pushed[0].like(tmp_path / "two", weights=False)
        shutil.rmtree(two.folder / "models")
        assert counts(two.build(*ask)) == (0, 12)
        assert same(pushed[0], two)
        assert contents(two.out / "soup")["tokenizer.json"] == contents(pushed[0].out / "soup")["tokenizer.json"]

    def test_what_no_cache_has_needs_the_weights(
        self, pushed: tuple[Machine, Path], tmp_path: Path, ask: tuple[str | Path, ...]
    ) -> None:
        two = pushed[0].like(tmp_path / "two", weights=False)
        recipe = Path(two.recipe)
        recipe.write_text(recipe.read_text().replace("weight: 0.5", "weight: 0.25", 1))
        status, code, error = fails(two.recipe, "--store", two.store, *ask)
        assert (status, code) == (4, "KB260")
        assert "weights" in error["message"]

    def test_with_the_weights_they_are_read_only_to_be_known(
        self, pushed: tuple[Machine, Path], second: Machine, ask: tuple[str | Path, ...]
    ) -> None:
        assert counts(second.build(*ask)) == (0, 12)
        assert same(pushed[0], second)

    def test_never_fetches_nothing(self, second: Machine, ask: tuple[str | Path, ...]) -> None:
        assert counts(second.build(*ask[:-1], "never")) == (12, 0)

    def test_compressed_blobs_have_the_same_digests(
        self, pushed: tuple[Machine, Path], second: Machine, keys: dict[str, tuple[Path, str]], tmp_path: Path
    ) -> None:
        small = tmp_path / "small"
        document = pushed[0].push(small, keys["team-1"][0], "--zstd")
        assert {"".join(path.suffixes) for path in small.glob("cas/*/*")} == {".bg.zst"}
        assert document["bytes"] < sum(path.stat().st_size for path in pushed[1].glob("cas/*/*"))
        document = second.build("--substituter", small, "--trust", keys["team-1"][1], "--fetch", "always")
        assert counts(document) == (0, 12)
        assert same(pushed[0], second)

    def test_plainly_compressed_blobs_of_older_pushes_are_read(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:
        for path in list(cache.glob("cas/*/*")):
            path.with_name(f"{path.name}.zst").write_bytes(zstandard.compress(path.read_bytes()))
            path.unlink()
        (cache / "kittybuild-cache.json").write_text('{"kittybuild.cache": 1, "blobs": ["zstd", "raw"]}')
        assert counts(second.build(*ask)) == (0, 12)
        assert same(pushed[0], second)

    def test_a_second_push_sends_nothing_and_heals_what_is_cut(
        self, pushed: tuple[Machine, Path], cache: Path, keys: dict[str, tuple[Path, str]]
    ) -> None:
        assert pushed[0].push(cache, keys["team-1"][0])["blobs"] == 0
        largest = max(cache.glob("cas/*/*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])
        assert pushed[0].push(cache, keys["team-1"][0])["blobs"] == 1
        assert Digest.of(largest.read_bytes()).hex == largest.name

    def test_pull_brings_it_and_the_build_then_needs_nobody(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, keys: dict[str, tuple[Path, str]]
    ) -> None:
        args = ("cache", "pull", second.recipe, "--store", second.store)
        status, document = run_cli(*args, "--from", cache, "--trust", keys["team-1"][1])
        assert (status, document["lacking"]) == (0, 0), document
        assert document["fetched"] == 24
        document = second.build()
        assert counts(document) == NOTHING
        assert same(pushed[0], second)

    def test_an_output_folder_can_be_pushed(
        self, pushed: tuple[Machine, Path], second: Machine, keys: dict[str, tuple[Path, str]], tmp_path: Path
    ) -> None:
        one, (secret, public) = pushed[0], keys["team-1"]
        args = ("--store", one.store, "--to", tmp_path / "c", "--key", secret)
        status, document = run_cli("cache", "push", one.out / "soup", *args)
        assert (status, document["claims"], document["sources"]) == (0, 13, 0), document
        built = second.build("--substituter", tmp_path / "c", "--trust", public, "--fetch", "always")
        assert counts(built)[1] >= 8, "those that wait for no intermediate"
        assert same(one, second)

    def test_settings_of_the_project_name_cache_and_key(
        self, second: Machine, cache: Path, keys: dict[str, tuple[Path, str]]
    ) -> None:
        settings = {"substituters": [os.path.relpath(cache, second.folder)], "trusted": [keys["team-1"][1]]}
        (second.folder / "kittybuild.yml").write_text(json.dumps(settings))
        assert counts(second.build("--fetch", "always")) == (0, 12)

    def test_info_tells_who_signed(self, cache: Path) -> None:
        status, document = run_cli("cache", "info", cache)
        assert status == 0
        assert set(document["signers"]) == {"team-1"}
        assert document["blobs"] == len(list(cache.glob("cas/*/*")))


class TestPoison:
    """Each is refused, told, and survived: the build ends with the right bytes."""

    def spoiled(
        self,
        pushed: tuple[Machine, Path],
        second: Machine,
        ask: tuple[str | Path, ...],
        told: str,
        computed: int = 12,
    ) -> None:
        from click.testing import CliRunner

        from kittybuild.cli import main

        done = CliRunner().invoke(
            main, list(map(str, ("build", second.recipe, "--store", second.store, *ask, "--json")))
        )
        document = json.loads(done.stdout)
        assert done.exit_code == 0, done.output
        assert told in done.stderr
        assert counts(document)[0] == computed, document
        assert same(pushed[0], second)

    def test_altered_blobs(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        assert spoil(cache, "cas/*/*", lambda data: data[:-1] + bytes([data[-1] ^ 1]))
        self.spoiled(pushed, second, ask, "is damaged: it is not used")

    def test_cut_blobs(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        spoil(cache, "cas/*/*", lambda data: data[: len(data) // 2])
        self.spoiled(pushed, second, ask, "is damaged: it is not used")

    def test_blobs_that_are_too_large(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        for path in cache.glob("cas/*/*"):
            os.truncate(path, 10_000_000_000)
        self.spoiled(pushed, second, ask, "10000000000 bytes, more than the")

    def test_claims_that_are_too_large(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        for path in [*cache.glob("traces/*/*"), *cache.glob("stages/*/*")]:
            os.truncate(path, 10_000_000_000)
        self.spoiled(pushed, second, ask, "more than the")

    def test_lost_blobs(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        shutil.rmtree(cache / "cas")
        self.spoiled(pushed, second, ask, "")

    def test_altered_claims(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        def lie(form: dict[str, list[list[object]]]) -> None:
            form["outputs"][0][1] = "0" * 64

        assert spoil(cache, "[st][tr]a*es/*/*", edited(lie))
        self.spoiled(pushed, second, ask, "refused: its signature is wrong")

    def test_claims_of_a_key_that_nobody_trusts(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...],
        keys: dict[str, tuple[Path, str]], tmp_path: Path
    ) -> None:  # fmt: skip
        shutil.rmtree(cache / "traces"), shutil.rmtree(cache / "stages")
        pushed[0].push(cache, keys["mallory-1"][0])
        self.spoiled(pushed, second, ask, "")

    def test_claims_of_another_key_under_a_trusted_name(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...],
        keys: dict[str, tuple[Path, str]]
    ) -> None:  # fmt: skip
        pushed[0].push(cache, keys["mallory-1"][0])
        for path in cache.glob("*/*/mallory-1.json"):
            os.replace(path, path.with_name("team-1.json"))
        self.spoiled(pushed, second, ask, "signed by 'mallory-1', which is not the key that is trusted")

    def test_claims_repeated_about_other_derivations(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        for kind in ("traces", "stages"):
            paths = sorted(cache.glob(f"{kind}/*/*"))
            texts = [path.read_bytes() for path in paths]
            for path, text in zip(paths, [*texts[1:], texts[0]], strict=True):
                path.write_bytes(text)
        self.spoiled(pushed, second, ask, "refused: it is about something else")

    def test_claims_of_another_dtype(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...],
        keys: dict[str, tuple[Path, str]]
    ) -> None:  # fmt: skip
        shutil.rmtree(cache / "stages")
        key = SigningKey.read(str(keys["team-1"][0]))
        for path in cache.glob("traces/*/*"):
            about = Digest(path.parent.name)
            ref = TensorRef(Digest.of(b"x"), TensorSpec(DType.F16, (1, 2)))
            path.write_bytes(outputs_claim("traces", about, [Output(about, ref)], key))
        self.spoiled(pushed, second, ask, "refused: it gives F16[1, 2] for BF16")

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b'{"signature": 1}', b"[" * 100_000, b"\xff\xfe"])
    def test_claims_that_are_none(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...], text: bytes
    ) -> None:  # fmt: skip
        spoil(cache, "traces/*/*", lambda _: text)
        spoil(cache, "stages/*/*", lambda _: text)
        self.spoiled(pushed, second, ask, "")

    def test_a_cache_of_another_format(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...]
    ) -> None:  # fmt: skip
        (cache / "kittybuild-cache.json").write_text('{"kittybuild.cache": 9, "blobs": ["raw"]}')
        self.spoiled(pushed, second, ask, "KB807")


class TestTrust:
    def test_a_key_is_kept_from_others(self, tmp_path: Path) -> None:
        file = tmp_path / "deep" / "team.key"
        status, document = run_cli("cache", "keygen", "team", "-o", file)
        assert (status, document["public"].partition(":")[0]) == (0, "team-1")
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert run_cli("cache", "keygen", "team", "-o", file)[0] == 8, "a key is never overwritten"

    @pytest.mark.parametrize("spoiling", ["lost", "read by all", "cut", "no text"])
    def test_a_key_file_that_cannot_be_used_stops(
        self, pushed: tuple[Machine, Path], tmp_path: Path, spoiling: str
    ) -> None:
        file, _ = signer(tmp_path, "team-1")
        secret = file.read_text()
        match spoiling:
            case "lost":
                file.unlink()
            case "read by all":
                file.chmod(0o644)
            case "cut":
                file.write_text(secret[:40])
            case "no text":
                file.write_bytes(b"\xff" * 40)
        one = pushed[0]
        args = ("--store", one.store, "--to", tmp_path / "c", "--key", file)
        status, document = run_cli("cache", "push", one.recipe, *args)
        assert (status, document["errors"][0]["code"]) == (8, "KB803")
        assert secret[10:30] not in json.dumps(document)

    def test_a_trusted_key_that_is_none_stops(self, second: Machine, cache: Path) -> None:
        args = ("--store", second.store, "--substituter", cache, "--trust", "team-1:AAAA")
        assert fails(second.recipe, *args)[:2] == (8, "KB804")

    def test_a_cache_nobody_can_push_to_stops(
        self, pushed: tuple[Machine, Path], keys: dict[str, tuple[Path, str]], tmp_path: Path
    ) -> None:
        one = pushed[0]
        (tmp_path / "file").write_text("no folder")
        for to, code in ((tmp_path / "file", "KB801"), ("http://127.0.0.1:9/cache", "KB802"), ("ftp://x/y", "KB801")):
            args = ("--store", one.store, "--to", to, "--key", keys["team-1"][0])
            status, document = run_cli("cache", "push", one.recipe, *args)
            assert (status, document["errors"][0]["code"]) == (8, code), to

    def test_what_is_not_built_is_not_pushed(self, second: Machine, keys: dict[str, tuple[Path, str]]) -> None:
        args = ("--store", second.store, "--to", second.folder / "c", "--key", keys["team-1"][0])
        status, document = run_cli("cache", "push", second.recipe, *args)
        assert (status, document["errors"][0]["code"]) == (8, "KB806")

    def test_a_quorum_of_two_takes_what_two_signed(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, keys: dict[str, tuple[Path, str]]
    ) -> None:
        both = ("--trust", keys["team-1"][1], "--trust", keys["other-1"][1])
        ask = ("--substituter", cache, "--fetch", "always", "--quorum", "2", *both)
        assert counts(second.build("soup", *ask)) == (12, 0)
        pushed[0].push(cache, keys["other-1"][0])
        assert counts(pushed[0].like(second.folder.parent / "three", weights=True).build(*ask)) == (0, 12)

    def lie(self, one: Machine, cache: Path, secret: Path, trace: Path) -> Digest:
        """Have a signer claim something else of one derivation."""
        about = Digest(trace.parent.name)
        with Store.open(str(one.store)) as store:
            ref = store.realisation(about)
        assert ref is not None
        wrong = bytes(ref.spec.nbytes)
        place = cache / "cas" / Digest.of(wrong).hex[:2] / Digest.of(wrong).hex
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(wrong)
        key = SigningKey.read(str(secret))
        claim = outputs_claim("traces", about, [Output(about, TensorRef(Digest.of(wrong), ref.spec))], key)
        (trace.parent / f"{key.name}.json").write_bytes(claim)
        return about

    def test_signers_who_disagree_are_told_and_none_is_believed(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, keys: dict[str, tuple[Path, str]]
    ) -> None:
        shutil.rmtree(cache / "stages")
        lied = {self.lie(pushed[0], cache, keys["other-1"][0], trace) for trace in cache.glob("traces/*/team-1.json")}
        both = ("--trust", keys["team-1"][1], "--trust", keys["other-1"][1])
        command = [sys.executable, "-m", "kittybuild", "build", second.recipe, "--store", str(second.store)]
        command += map(str, ("--substituter", cache, "--fetch", "always", *both, "--json"))
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert counts(json.loads(done.stdout)) == (12, 0)
        assert all(f"derivation {about} makes" in done.stderr for about in lied if about.hex in done.stderr)
        assert "signers disagree" in done.stderr
        assert "other-1:" in done.stderr
        assert "team-1:" in done.stderr
        assert same(pushed[0], second)

    def test_an_audit_finds_a_lie_and_stops(
        self, pushed: tuple[Machine, Path], second: Machine, cache: Path, ask: tuple[str | Path, ...],
        keys: dict[str, tuple[Path, str]],
    ) -> None:  # fmt: skip
        shutil.rmtree(cache / "stages")
        for trace in cache.glob("traces/*/team-1.json"):
            self.lie(pushed[0], cache, keys["team-1"][0], trace)
        status, code, error = fails(second.recipe, "--store", second.store, *ask, "--audit", "100")
        assert (status, code) == (8, "KB805")
        assert "team-1 signed" in error["message"]

    def test_an_audit_of_what_is_true_computes_and_goes_on(
        self, pushed: tuple[Machine, Path], second: Machine, ask: tuple[str | Path, ...]
    ) -> None:
        assert counts(second.build(*ask, "--audit", "100")) == (12, 0)
        assert same(pushed[0], second)


def test_a_build_without_caches_loads_neither_obstore_nor_cryptography(second: Machine, tmp_path: Path) -> None:
    recipe = linear(tmp_path, {second.folder / "models/base": 0.5, second.folder / "models/happy": 0.5})
    build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    code = (
        "import runpy, sys\ntry:\n    runpy.run_module('kittybuild', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "print([name for name in ('obstore', 'cryptography', 'zstandard') if name in sys.modules])"
    )
    args = [
        "build",
        recipe,
        "-o",
        str(tmp_path / "new"),
        "--store",
        str(tmp_path / "new-store"),
        "--workers",
        "threads",
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_repair_fetches_what_is_damaged_where_there_are_no_weights(
    pushed: tuple[Machine, Path], tmp_path: Path, ask: tuple[str | Path, ...]
) -> None:
    two = pushed[0].like(tmp_path / "bare", weights=False)
    two.build(*ask)
    for pack in two.store.glob("packs/*/*.safetensors"):
        data = bytearray(pack.read_bytes())
        data[-1] ^= 1
        pack.chmod(0o644)
        pack.write_bytes(data)
    status, alone = run_cli("store", "repair", "--store", two.store)
    assert (status, alone["errors"][0]["code"]) == (7, "KB712")
    status, document = run_cli("store", "repair", "--store", two.store, *ask)
    assert status == 0, document
    assert {output["output"] for output in document["built"]} == {"soup", "copy"}
    assert same(pushed[0], two)
