"""`verify`: a folder is what its kittybuild.json says, or what differs is named and the exit status is 6."""

from __future__ import annotations

import base64
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from kittybuild.model import merkle
from kittybuild.publish.folder import ATTESTATION
from kittybuild.publish.provenance import read_provenance
from kittybuild.store.remote.keys import PublicKey, SigningKey
from tests.building import build, linear
from tests.helpers import load_tensors, pico_llama, run_cli, save_tensors, write_json

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = pico_llama(folder / "base", 1)
    pico_llama(folder / "happy", 2, base=base)
    return folder


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of several shards, built with an attestation; beside it the key."""
    top = tmp_path_factory.mktemp("verify")
    recipe = top / "recipe.yml"
    uses = "\n".join(f"      - {{model: {models / name}, parameters: {{weight: 0.5}}}}" for name in ("base", "happy"))
    recipe.write_text(
        "kittybuild: 1\nstages:\n  soup:\n    merge_method: linear\n    models:\n"
        + uses
        + "\noutputs:\n  soup: {folder: soup, shard_size: 40KB}\n",
        encoding="utf-8",
    )
    key = SigningKey("team-1", bytes(range(32)))
    key.write(str(top / "key"))
    (top / "key.pub").write_text(f"{key.public}\n", encoding="utf-8")
    build(recipe, "--store", top / "store", "--attest", top / "key")
    return top


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A writable copy of it."""
    shutil.copytree(made / "soup", tmp_path / "soup", copy_function=shutil.copyfile)
    return tmp_path / "soup"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def edit(folder: Path, name: str = NORM) -> str:
    """Change one element of a tensor in its shard; the name of the shard's file."""
    for file in shards(folder):
        from safetensors.torch import load_file

        tensors = load_file(file)
        if name in tensors:
            tensors[name][0] += 1
            save_tensors(file, tensors)
            return file.name
    raise AssertionError(name)


def passes(folder: Path, *args: str | Path) -> dict[str, Any]:
    status, document = run_cli("verify", folder, *args)
    assert (status, document["ok"]) == (0, True), document
    return document


def fails(folder: Path, *args: str | Path, code: str = "KB603") -> dict[str, Any]:
    status, document = run_cli("verify", folder, *args)
    assert (status, document["ok"], document["errors"][0]["code"]) == (6, False, code), document
    return document


def test_what_was_built_is_what_it_says(folder: Path) -> None:
    document = passes(folder)
    assert len(shards(folder)) > 1
    assert document["tensors"] == len(load_tensors(folder))
    assert document["missing"] == document["changed"] == document["extra"] == {"tensors": [], "files": []}
    assert document["root"] == read_provenance(str(folder)).root.hex


def test_a_changed_tensor_is_named(folder: Path) -> None:
    file = edit(folder)
    document = fails(folder)
    assert document["changed"] == {"tensors": [NORM], "files": []}
    assert f"changed: tensor {NORM}" in document["errors"][0]["message"]
    assert fails(folder, "--shard", file)["changed"]["tensors"] == [NORM]
    assert fails(folder, "--tensor", NORM)["changed"]["tensors"] == [NORM]
    other = next(path.name for path in shards(folder) if path.name != file)
    assert passes(folder, "--shard", other)["files"] == 1
    assert passes(folder, "--tensor", "lm_head.weight")["tensors"] == 1


def test_one_shard_needs_no_other(folder: Path) -> None:
    first, *others = shards(folder)
    for file in others:
        file.unlink()
    passes(folder, "--shard", first.name)
    assert fails(folder)["missing"]["files"] == [file.name for file in others]


def test_tensors_and_files_that_are_too_few_or_too_many(folder: Path) -> None:
    from safetensors.torch import load_file

    first = shards(folder)[0]
    tensors = load_file(first)
    gone = sorted(tensors)[0]
    tensors["another"] = tensors.pop(gone)
    save_tensors(first, tensors)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "generation_config.json").unlink()
    write_json(folder / "adapter_config.json", {})
    (folder / ".gitattributes").touch()
    document = fails(folder)
    assert document["missing"] == {"tensors": [gone], "files": ["generation_config.json"]}
    assert document["extra"] == {"tensors": ["another"], "files": ["adapter_config.json"]}
    assert document["changed"] == {"tensors": [], "files": ["config.json"]}


def test_files_of_ones_own_may_be_allowed(folder: Path) -> None:
    (folder / "notes.txt").touch()
    assert fails(folder)["extra"]["files"] == ["notes.txt"]
    assert passes(folder, "--allow-extra")["extra"]["files"] == ["notes.txt"]


def test_an_edited_card_is_told_and_no_error(folder: Path) -> None:
    (folder / "README.md").write_text("mine", encoding="utf-8")
    assert passes(folder)["readme_edited"] is True


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("root",), "0" * 64),
        (("manifest_digest",), "0" * 64),
        (("manifest", "tensors", 0, 0), "another"),
        (("manifest", "tensors", 0, 1), "0" * 64),
        (("texts", "../../etc/passwd"), "0" * 64),
        (("files",), [["x"]]),
        (("recipe",), None),
        (("format",), 1),
    ],
)
def test_a_story_that_contradicts_itself_is_refused(folder: Path, at: tuple[Any, ...], value: Any) -> None:
    story = json.loads((folder / "kittybuild.json").read_text(encoding="utf-8"))
    *path, last = at
    place = story
    for key in path:
        place = place[key]
    place[last] = value
    write_json(folder / "kittybuild.json", story)
    fails(folder, code="KB602")


def test_a_folder_without_a_story(tmp_path: Path) -> None:
    fails(tmp_path, code="KB602")


@pytest.mark.parametrize(("option", "word"), [("--shard", "model-00009.safetensors"), ("--tensor", "model.nrm.weight")])
def test_names_that_are_none(folder: Path, option: str, word: str) -> None:
    status, document = run_cli("verify", folder, option, word)
    assert (status, document["errors"][0]["code"]) == (2, "KB016")


class TestAttestation:
    """A signature binds the root of the tensors and every file; who signed is believed only if he is trusted."""

    def test_a_trusted_key_signed(self, made: Path, folder: Path) -> None:
        assert passes(folder, "--trusted", made / "key.pub")["signed_by"] == ["team-1"]
        assert passes(folder, "--trusted", (made / "key.pub").read_text().strip())["signed_by"] == ["team-1"]
        assert passes(folder)["signed_by"] == []

    def test_it_is_a_slsa_statement_that_names_every_file(self, folder: Path) -> None:
        import hashlib

        envelope = json.loads((folder / ATTESTATION).read_text(encoding="utf-8"))
        statement = json.loads(base64.b64decode(envelope["payload"]))
        assert envelope["payloadType"] == "application/vnd.in-toto+json"
        assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
        subjects = {one["name"]: one["digest"] for one in statement["subject"]}
        assert subjects.pop("tensors") == {"kittybuild.merkle.v1": read_provenance(str(folder)).root.hex}
        files = {path.name: path for path in folder.iterdir() if path.name != ATTESTATION}
        assert subjects == {
            name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for name, path in files.items()
        }

    def test_the_signature_is_dsse_over_type_and_payload(self, made: Path, folder: Path) -> None:
        envelope = json.loads((folder / ATTESTATION).read_text(encoding="utf-8"))
        payload = base64.b64decode(envelope["payload"])
        kind = envelope["payloadType"].encode()
        signed = b" ".join([b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload])
        key = PublicKey.parse((made / "key.pub").read_text())
        assert key.signed(signed, f"team-1:{envelope['signatures'][0]['sig']}")

    def test_another_key_is_not_believed(self, folder: Path) -> None:
        other = SigningKey("team-1", b"x" * 32)
        fails(folder, "--trusted", str(other.public), code="KB604")

    def test_a_changed_payload_is_not_believed(self, made: Path, folder: Path) -> None:
        envelope = json.loads((folder / ATTESTATION).read_text(encoding="utf-8"))
        payload = base64.b64decode(envelope["payload"]).replace(b"linear", b"slinky")
        write_json(folder / ATTESTATION, {**envelope, "payload": base64.b64encode(payload).decode()})
        fails(folder, "--trusted", made / "key.pub", code="KB604")

    def test_the_attestation_of_another_folder_is_not_believed(
        self, made: Path, models: Path, folder: Path, tmp_path: Path
    ) -> None:
        recipe = linear(tmp_path, {models / "base": 0.3, models / "happy": 0.7})
        build(recipe, "-o", tmp_path / "other", "--store", tmp_path / "store")
        shutil.copy(folder / ATTESTATION, tmp_path / "other" / ATTESTATION)
        fails(tmp_path / "other", "--trusted", made / "key.pub", code="KB604")

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"payload": "?", "signatures": []}', '{"payload": 1}'])
    def test_a_damaged_one_is_not_believed(self, made: Path, folder: Path, text: str) -> None:
        (folder / ATTESTATION).write_text(text, encoding="utf-8")
        fails(folder, "--trusted", made / "key.pub", code="KB604")
        os.unlink(folder / ATTESTATION)
        fails(folder, "--trusted", made / "key.pub", code="KB604")

    def test_a_shard_is_verified_against_the_signed_root(self, made: Path, folder: Path) -> None:
        file = edit(folder)
        document = fails(folder, "--shard", file, "--trusted", made / "key.pub")
        assert (document["signed_by"], document["changed"]["tensors"]) == (["team-1"], [NORM])

    def test_equal_builds_have_equal_attestations(self, made: Path, folder: Path, tmp_path: Path) -> None:
        build(made / "recipe.yml", "-o", tmp_path / "soup2", "--store", tmp_path / "store", "--attest", made / "key")
        one, two = (json.loads((place / ATTESTATION).read_text()) for place in (folder, tmp_path / "soup2"))
        names = [
            [
                s
                for s in json.loads(base64.b64decode(e["payload"]))["subject"]
                if s["name"] not in ("README.md", "kittybuild.json")
            ]
            for e in (one, two)
        ]  # the card has the name of the folder
        assert names[0] == names[1]

    def test_a_build_without_a_key_leaves_no_old_attestation(self, made: Path, tmp_path: Path) -> None:
        args = made / "recipe.yml", "-o", tmp_path / "soup", "--store", tmp_path / "store"
        build(*args, "--attest", made / "key")
        assert (tmp_path / "soup" / ATTESTATION).is_file()
        build(*args)
        assert not (tmp_path / "soup" / ATTESTATION).exists()
        passes(tmp_path / "soup")


def test_the_root_is_over_names_in_order_and_odd_ones_go_up() -> None:
    from kittybuild.digest import Digest, tagged
    from kittybuild.tensors import DType, TensorRef, TensorSpec

    refs = {name: TensorRef(Digest.of(name.encode()), TensorSpec(DType.U8, (1,))) for name in "cab"}
    a, b, c = (merkle.leaf(name, refs[name]).hex for name in "abc")
    left = tagged("kittybuild.merkle-node.v1", [a, b]).hex
    assert merkle.root(refs) == tagged("kittybuild.merkle-node.v1", [left, c])
    assert merkle.root({"a": refs["a"]}).hex == a
    assert merkle.root({}) == tagged("kittybuild.merkle-node.v1", [])
    assert merkle.root({**refs, "b": refs["a"]}) != merkle.root(refs)


def test_a_recipe_with_intermediate_stages_tells_the_inputs_of_each(models: Path, tmp_path: Path) -> None:
    recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": 0.5})
    build(recipe, "-o", tmp_path / "out", "--store", tmp_path / "store")
    said = read_provenance(str(tmp_path / "out"))
    made = said.derivations["merge"][NORM]
    assert (made.builder, made.version, made.numerics) == ("linear", 1, "kitty-1")
    assert made.key == next(tensor.key.hex for tensor in said.manifest.tensors if tensor.name == NORM and tensor.key)
    assert [(of, name) for of, name, _ in made.inputs] == [(str(models / n), NORM) for n in ("base", "happy")]
