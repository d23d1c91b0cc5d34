"""Checkpoint folders in the Hugging Face layout, sound and hostile: no path leaves the folder, no tensor is lost."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kittybuild.checkpoint.folder import read_folder
from kittybuild.checkpoint.opening import find, fingerprint, open_source, package_file
from kittybuild.checkpoint.source import FileId
from kittybuild.errors import SourceError
from tests.helpers import pico_adapter, pico_llama, write_json
from tests.planning import Header, header_bytes, llama, write_header

INDEX = "model.safetensors.index.json"
X: Header = {"x": ("F32", (2,))}
Y: Header = {"y": ("F32", (2,))}


def folder(tmp_path: Path, weight_map: Any, **files: Header) -> Path:
    """A sharded checkpoint: its index, and files by stem."""
    path = tmp_path / "model"
    path.mkdir()
    write_json(path / INDEX, weight_map if isinstance(weight_map, list) else {"weight_map": weight_map})
    for name, header in files.items():
        (path / f"{name}.safetensors").write_bytes(header_bytes(header))
    return path


def refused(path: Path, code: str) -> SourceError:
    with pytest.raises(SourceError) as caught:
        read_folder(str(path))
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value


class TestSound:
    def test_one_file(self, tmp_path: Path) -> None:
        path = pico_llama(tmp_path / "base", 1, tokenizer=True)
        found = read_folder(str(path))
        assert (found.kind, found.where, found.notes) == ("folder", str(path), ())
        assert len(found.entries) == 21
        assert found.config is not None
        assert found.config["num_hidden_layers"] == 2
        assert [companion.name for companion in found.companions] == [
            "config.json",
            "generation_config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]

    def test_shards(self, tmp_path: Path) -> None:
        one = read_folder(str(pico_llama(tmp_path / "one", 1)))
        three = read_folder(str(pico_llama(tmp_path / "three", 1, shards=3)))
        assert set(three.entries) == set(one.entries)
        assert {name: entry.spec for name, entry in three.entries.items()} == {
            name: entry.spec for name, entry in one.entries.items()
        }
        assert len({entry.file for entry in three.entries.values()}) == 3

    def test_every_file_that_counts_is_known_by_its_identity(self, tmp_path: Path) -> None:
        path = pico_llama(tmp_path / "base", 1, shards=2)
        found = read_folder(str(path))
        names = {os.path.basename(file.path) for file in found.files}
        assert names == set(os.listdir(path))
        assert FileId.of(str(path / INDEX)) in found.files

    def test_shards_may_lie_in_a_folder_inside(self, tmp_path: Path) -> None:
        path = folder(tmp_path, {"x": "part/a.safetensors"})
        (path / "part").mkdir()
        (path / "part" / "a.safetensors").write_bytes(header_bytes(X))
        assert read_folder(str(path)).entries["x"].file == str(path / "part" / "a.safetensors")

    def test_a_single_file_may_have_another_name(self, tmp_path: Path) -> None:
        path = tmp_path / "model"
        path.mkdir()
        (path / "diffusion.safetensors").write_bytes(header_bytes(X))
        assert list(read_folder(str(path)).entries) == ["x"]
        assert read_folder(str(path)).config is None

    def test_weights_beside_the_index_are_not_read_and_that_is_noted(self, tmp_path: Path) -> None:
        path = folder(tmp_path, {"x": "a.safetensors"}, a=X, consolidated=Y)
        assert read_folder(str(path)).notes == (
            "not read, since the weights are in other files: 'consolidated.safetensors'",
        )

    def test_companions_are_all_files_but_weights_and_what_we_write_ourselves(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X)
        for name in (
            "README.md",
            "kittybuild.json",
            ".gitattributes",
            "modeling_x.py",
            "pytorch_model.bin",
            "model.gguf",
            "tokenizer.model",
            "chat_template.jinja",
            "sub/params.json",
            ".cache/x.json",
        ):
            (path / name).parent.mkdir(exist_ok=True)
            (path / name).write_text("x", encoding="utf-8")
        names = [companion.name for companion in read_folder(str(path)).companions]
        assert names == ["chat_template.jinja", "config.json", "modeling_x.py", "sub/params.json", "tokenizer.model"]


class TestPickled:
    """The same folders with files of torch.save."""

    def save(self, path: Path, **tensors: torch.Tensor) -> None:
        path.parent.mkdir(exist_ok=True)
        torch.save(tensors, path)

    def test_one_file(self, tmp_path: Path) -> None:
        self.save(tmp_path / "model" / "pytorch_model.bin", x=torch.ones(2))
        write_json(tmp_path / "model" / "config.json", {"model_type": "x"})
        for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "vocab.txt"):
            (tmp_path / "model" / name).write_bytes(b"not read")
        found = read_folder(str(tmp_path / "model"))
        assert (list(found.entries), found.notes, found.config) == (["x"], (), {"model_type": "x"})
        assert [companion.name for companion in found.companions] == ["config.json", "vocab.txt"]

    @pytest.mark.parametrize("name", ["state_dict.pt", "consolidated.00.pth", "weights.bin"])
    def test_a_single_file_may_have_another_name(self, tmp_path: Path, name: str) -> None:
        self.save(tmp_path / name, x=torch.ones(2))
        (tmp_path / "training_args.bin").write_bytes(b"not read")
        assert list(read_folder(str(tmp_path)).entries) == ["x"]

    def test_safetensors_come_first_and_the_rest_is_noted(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X)
        (path / "pytorch_model.bin").write_bytes(b"not read")
        assert read_folder(str(path)).notes == ("not read, since the weights are in other files: 'pytorch_model.bin'",)

    def sharded(self, tmp_path: Path, weight_map: dict[str, str]) -> Path:
        path = tmp_path / "model"
        self.save(path / "a.bin", x=torch.ones(2), step=torch.tensor(1))
        torch.save({"y": torch.zeros(3), "note": "a text"}, path / "b.bin")
        write_json(path / "pytorch_model.bin.index.json", {"weight_map": weight_map})
        return path

    def test_shards(self, tmp_path: Path) -> None:
        found = read_folder(str(self.sharded(tmp_path, {"x": "a.bin", "step": "a.bin", "y": "b.bin"})))
        assert set(found.entries) == {"x", "step", "y"}
        assert found.notes == ("b.bin: not read, since it is no tensor: 'note'",)
        assert {os.path.basename(file.path) for file in found.files} == {
            "a.bin",
            "b.bin",
            "pytorch_model.bin.index.json",
        }

    def test_an_index_that_leads_out_is_refused(self, tmp_path: Path) -> None:
        self.save(tmp_path / "other" / "a.bin", x=torch.ones(2))
        refused(self.sharded(tmp_path, {"x": "../other/a.bin"}), "KB204")

    def test_an_index_that_does_not_fit_is_refused(self, tmp_path: Path) -> None:
        path = self.sharded(tmp_path, {"x": "a.bin", "y": "b.bin"})
        assert "shards hold tensors the index lacks: 'step'" in refused(path, "KB205").message

    def test_a_link_that_leads_out_is_refused(self, tmp_path: Path) -> None:
        self.save(tmp_path / "other" / "a.bin", x=torch.ones(2))
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "pytorch_model.bin").symlink_to(tmp_path / "other" / "a.bin")
        refused(tmp_path / "model", "KB204")


class TestIndex:
    """What an index may say is decided by us, not by it."""

    @pytest.mark.parametrize(
        "file",
        [
            "../other/a.safetensors",
            "a/../../b.safetensors",
            "/etc/passwd",
            "..",
            "",
            "a\\..\\b.safetensors",
            "a\0.safetensors",
        ],
    )
    def test_a_file_outside_the_folder_is_refused(self, tmp_path: Path, file: str) -> None:
        other = tmp_path / "other"
        other.mkdir()
        (other / "a.safetensors").write_bytes(header_bytes(X))
        assert "outside its folder" in refused(folder(tmp_path, {"x": file}), "KB204").message

    def test_a_file_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        path = folder(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=X)
        assert refused(path, "KB205").message == "the index names files that are not there: 'b.safetensors'"

    def test_a_tensor_that_its_shard_does_not_hold(self, tmp_path: Path) -> None:
        path = folder(tmp_path, {"x": "a.safetensors", "z": "a.safetensors"}, a=X)
        assert "names tensors that its shards do not hold: 'z'" in refused(path, "KB205").message

    def test_a_tensor_that_the_index_does_not_name(self, tmp_path: Path) -> None:
        path = folder(tmp_path, {"x": "a.safetensors"}, a={**X, **Y})
        assert "shards hold tensors the index lacks: 'y'" in refused(path, "KB205").message

    def test_a_tensor_that_two_shards_hold(self, tmp_path: Path) -> None:
        path = folder(tmp_path, {"x": "a.safetensors", "y": "b.safetensors"}, a=X, b={**X, **Y})
        assert "shards hold tensors the index lacks: 'x'" in refused(path, "KB205").message

    @pytest.mark.parametrize("form", [[], {"x": 3}, {"x": None}, ["a"], {"x": ["a.safetensors"]}])
    def test_an_index_of_another_form(self, tmp_path: Path, form: Any) -> None:
        path = folder(tmp_path, form, a=X)
        with pytest.raises(SourceError) as caught:
            read_folder(str(path))
        assert caught.value.code == "KB206"

    @pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff", '{"weight_map": {"\\ud800": "a.safetensors"}}'])
    def test_an_index_that_is_no_json(self, tmp_path: Path, text: str) -> None:
        path = folder(tmp_path, {}, a=X)
        (path / INDEX).write_bytes(text.encode("latin-1"))
        assert "cannot read this JSON" in refused(path, "KB206").message

    def test_an_empty_index_is_no_checkpoint(self, tmp_path: Path) -> None:
        assert "no tensors" in refused(folder(tmp_path, {}, a=X), "KB205").message


class TestLinks:
    """A link in a checkpoint must not smuggle another file of this machine into an output."""

    @pytest.fixture
    def secret(self, tmp_path: Path) -> Path:
        path = tmp_path / "secret"
        path.mkdir()
        (path / "key.json").write_text("{}", encoding="utf-8")
        (path / "weights.safetensors").write_bytes(header_bytes(X))
        return path

    @pytest.mark.parametrize("name", ["config.json", "vocab.json", "sub/merges.txt"])
    def test_a_companion_that_leads_out(self, tmp_path: Path, secret: Path, name: str) -> None:
        path = write_header(tmp_path / "model", X, {})
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(secret / "key.json")
        assert refused(path, "KB204").message == f"{name} is a link that leads out of the folder"

    def test_weights_that_lead_out(self, tmp_path: Path, secret: Path) -> None:
        path = write_header(tmp_path / "model", X)
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").symlink_to(secret / "weights.safetensors")
        assert "leads out of the folder" in refused(path, "KB204").message

    def test_a_shard_that_leads_out(self, tmp_path: Path, secret: Path) -> None:
        path = folder(tmp_path, {"x": "a.safetensors"})
        (path / "a.safetensors").symlink_to("../secret/weights.safetensors")
        assert "leads out of the folder" in refused(path, "KB204").message

    def test_a_shard_in_a_linked_folder_leads_out_as_well(self, tmp_path: Path, secret: Path) -> None:
        path = folder(tmp_path, {"x": "sub/weights.safetensors"})
        (path / "sub").symlink_to(secret)
        assert "leads out of the folder" in refused(path, "KB204").message

    def test_a_link_inside_the_folder_is_fine(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X)
        (path / "vocab.json").symlink_to("config.json")
        assert "vocab.json" in [companion.name for companion in read_folder(str(path)).companions]

    def test_a_link_to_nothing_is_an_error_and_no_crash(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X)
        (path / "vocab.json").symlink_to("gone.json")
        assert "cannot read" in refused(path, "KB201").message

    def test_the_folder_itself_may_be_reached_through_a_link(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X)
        (tmp_path / "alias").symlink_to(path)
        assert list(read_folder(str(tmp_path / "alias")).entries) == ["x"]

    @pytest.fixture
    def snapshot(self, tmp_path: Path) -> Path:
        """A model as the Hugging Face cache keeps it: snapshots of links to blobs."""
        whole = write_header(tmp_path / "whole", llama())
        hub = tmp_path / "hub" / "models--org--name"
        (hub / "blobs").mkdir(parents=True)
        snapshot = hub / "snapshots" / "0123abcd"
        snapshot.mkdir(parents=True)
        for number, name in enumerate(sorted(os.listdir(whole))):
            shutil.copy(whole / name, hub / "blobs" / f"{number:040x}")
            (snapshot / name).symlink_to(f"../../blobs/{number:040x}")
        return snapshot

    def test_a_snapshot_of_the_hugging_face_cache_is_read(self, snapshot: Path) -> None:
        found = read_folder(str(snapshot))
        assert len(found.entries) == 21
        assert [companion.name for companion in found.companions] == ["config.json"]

    def test_from_a_snapshot_no_link_leads_to_another_model(self, snapshot: Path, tmp_path: Path) -> None:
        (snapshot / "vocab.json").symlink_to(tmp_path / "whole" / "config.json")
        refused(snapshot, "KB204")

    def test_a_folder_beside_blobs_is_no_snapshot(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "some" / "model", X)
        (tmp_path / "blobs").mkdir()
        (tmp_path / "blobs" / "x.json").write_text("{}", encoding="utf-8")
        (path / "x.json").symlink_to("../../blobs/x.json")
        refused(path, "KB204")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((), "holds no file of weights"),
        (("a.gguf", "optimizer.pt"), "holds no file of weights"),
        (("a.safetensors", "b.safetensors", "c.bin"), "2 files of weights ('a.safetensors', 'b.safetensors') and no"),
        (("a.bin", "b.pt", "training_args.bin"), "holds 2 files of weights ('a.bin', 'b.pt') and no index"),
    ],
)
def test_a_folder_without_a_checkpoint_says_what_it_holds(tmp_path: Path, names: tuple[str, ...], words: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(header_bytes(X))
    assert words in refused(tmp_path, "KB205").message


def test_a_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = write_header(tmp_path / "model", X)
    for text in ("[]", "{", "null", '{"x": "\\ud800"}'):
        (path / "config.json").write_text(text, encoding="utf-8")
        assert refused(path, "KB206").at == str(path / "config.json")


class TestOpening:
    def test_each_kind_by_what_it_is(self, tmp_path: Path) -> None:
        base = pico_llama(tmp_path / "base", 1)
        adapter = pico_adapter(tmp_path / "happy", base, 2)
        torch.save({"x": torch.ones(2)}, tmp_path / "x.pth")
        paths = (base, adapter, base / "model.safetensors", tmp_path / "x.pth")
        assert [open_source(str(path)).kind for path in paths] == ["folder", "adapter", "file", "file"]

    @pytest.mark.parametrize("name", ["model.onnx", "model", "none"])
    def test_another_file_is_no_checkpoint(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "model.onnx").write_bytes(b"x")
        (tmp_path / "model").write_bytes(b"x")
        with pytest.raises(SourceError) as caught:
            open_source(str(tmp_path / name))
        assert caught.value.code == "KB205"

    def test_a_file_without_tensors_is_no_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "x.safetensors").write_bytes(header_bytes({}))
        with pytest.raises(SourceError, match="no tensors"):
            open_source(str(tmp_path / "x.safetensors"))

    def test_a_path_is_looked_for_in_one_folder_after_the_other(self, tmp_path: Path) -> None:
        for name in ("first/a", "second/a", "second/b"):
            (tmp_path / name).mkdir(parents=True)
        folders = (str(tmp_path / "first"), str(tmp_path / "second"))
        assert find("a", folders) == str(tmp_path / "first" / "a")
        assert find("b", folders) == str(tmp_path / "second" / "b")
        assert find("c", folders) is None
        assert find(str(tmp_path / "second" / "b"), folders) == str(tmp_path / "second" / "b")

    def test_a_file_of_a_package(self) -> None:
        assert os.path.isfile(package_file("pytest", "pytest/__init__.py"))
        for package, file in (("pytest", "pytest/none.py"), ("no-such-package", "x"), ("pytest", "../../etc/passwd")):
            with pytest.raises(SourceError) as caught:
                package_file(package, file)
            assert caught.value.code == "KB209"


class TestFingerprint:
    """It changes with every file of a source, whatever the file is, and with nothing else."""

    def test_it_changes_with_every_file(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X)
        seen = {fingerprint(str(path))}
        assert fingerprint(str(path)) in seen
        for change in (
            lambda: (path / "config.json").write_text("{ }", encoding="utf-8"),
            lambda: (path / "new.txt").write_text("x", encoding="utf-8"),
            lambda: (path / "new.txt").rename(path / "other.txt"),
            lambda: os.utime(path / "model.safetensors", ns=(1, 1)),
            lambda: (path / "other.txt").unlink(),
        ):
            change()
            assert fingerprint(str(path)) not in seen
            seen.add(fingerprint(str(path)))

    def test_caches_in_hidden_folders_do_not_count(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X)
        before = fingerprint(str(path))
        (path / ".cache").mkdir()
        (path / ".cache" / "x").write_text("x", encoding="utf-8")
        assert fingerprint(str(path)) == before

    def test_a_file_has_one_too(self, tmp_path: Path) -> None:
        path = write_header(tmp_path / "model", X) / "model.safetensors"
        before = fingerprint(str(path))
        os.utime(path, ns=(1, 1))
        assert fingerprint(str(path)) != before

    def test_what_is_not_there_has_none(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError) as caught:
            fingerprint(str(tmp_path / "none"))
        assert caught.value.code == "KB201"
