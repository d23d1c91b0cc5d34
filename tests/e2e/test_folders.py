"""Disks and folders: full, read-only, elsewhere, somebody else's, or wanted by two at once."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kittybuild import api
from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.store import Store
from tests.building import build, build_into, contents, fails, linear, packs, started
from tests.faults import assert_sound
from tests.helpers import pico_llama, write_recipe
from tests.mounts import mounted


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pico_llama(folder / "base", 0)
    pico_llama(folder / "happy", 1, base=folder / "base")
    return folder


class FullDisk(Disk):
    """A disk with room for so many bytes of new files."""

    def __init__(self, room: int) -> None:
        self.room = room

    def create(self, path: str, size: int = 0) -> int:
        self.room -= size
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return super().create(path, size)


class ReadOnlyDisk(Disk):
    """A disk that was mounted read-only."""

    def open_lock(self, path: str) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


class TestDisks:
    def test_a_full_disk_says_so_and_keeps_the_old_model(self, args: Any, recipe: str, tmp_path: Path) -> None:
        build(*args)
        before = contents(tmp_path / "out")
        text = Path(recipe).read_text()
        Path(recipe).write_text(text.replace("0.5", "0.25"))
        prepared = api.prepare(api.read_recipe(recipe), folder=str(tmp_path / "out"))
        with Store.open(str(tmp_path / "store"), disk=FullDisk(30_000)) as store, pytest.raises(StoreError) as caught:
            api.build(prepared, store, processes=False)
        assert caught.value.code == "KB704"
        assert "bytes were wanted" in caught.value.message
        assert contents(tmp_path / "out") == before

    def test_a_full_disk_of_the_output_leaves_the_store_complete(self, recipe: str, tmp_path: Path) -> None:
        with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=20k", "tmpfs") as small:
            store = tmp_path / "store"
            status, code, error = fails(recipe, "-o", small / "out", "--store", store)
            assert (status, code, error["at"]) == (7, "KB704", str(small / "out"))
            assert not (small / "out").exists()
            assert build(recipe, "-o", tmp_path / "out", "--store", store)["stages"]["merge"]["computed"] == 0

    def test_an_output_on_another_file_system_is_a_copy_that_is_checked(self, args: Any, tmp_path: Path) -> None:
        with mounted(tmp_path / "out", "-t", "tmpfs", "tmpfs") as mount:
            out = mount / "model"
            again = (*args[:2], out, *args[3:])
            build(*again)
            assert out.stat().st_dev != (tmp_path / "store").stat().st_dev
            before = contents(out)
            inode = (out / "model.safetensors").stat().st_ino
            build(*again)
            assert (out / "model.safetensors").stat().st_ino == inode  # nothing to do
            with open(out / "model.safetensors", "r+b") as file:
                file.seek(-5, os.SEEK_END)
                file.write(b"\x55")
            build(*again)
            assert contents(out) == before

    def test_a_store_on_a_disk_mounted_read_only(self, args: Any, tmp_path: Path) -> None:
        build(*args)
        with mounted(tmp_path / "view", "--bind", str(tmp_path / "store")) as view:
            subprocess.run(["mount", "-o", "remount,ro,bind", str(view)], check=True)
            status, code, error = fails(*args[:4], view)
            assert (status, code) == (7, "KB701")
            assert error["at"] == str(view)

    def test_a_store_that_cannot_be_written(self, tmp_path: Path) -> None:
        Store.open(str(tmp_path / "store")).close()
        with pytest.raises(StoreError) as caught:
            Store.open(str(tmp_path / "store"), disk=ReadOnlyDisk())
        assert caught.value.code == "KB701"
        assert "--store" in str(caught.value.hint)


class TestTwoAtOnce:
    def test_two_builds_on_one_store_and_one_folder(self, args: Any, models: Path, tmp_path: Path) -> None:
        answers = [tmp_path / f"answer{number}.json" for number in range(2)]
        running = [started(build_into, str(answer), *map(str, args)) for answer in answers]
        for process in running:
            process.join()
        found = [json.loads(answer.read_text()) for answer in answers]
        assert [answer["status"] for answer in found] == [0, 0], found
        assert found[0]["stages"]["merge"]["manifest"] == found[1]["stages"]["merge"]["manifest"]
        assert_sound(str(tmp_path / "store"))
        assert len(packs(tmp_path / "store")) == 1
        assert not list((tmp_path / "store/tmp").iterdir())
        assert build(*args)["bytes"] == {"read": 0, "written": 0}

    def test_two_recipes_and_stores_into_one_folder_leave_one_of_the_two_models(
        self, models: Path, tmp_path: Path
    ) -> None:
        whole = []

        def publish(number: int) -> None:
            prepared = api.prepare(api.read_recipe(str(tmp_path / f"{number}.yml")), folder=str(tmp_path / "out"))
            with Store.open(str(tmp_path / f"store{number}")) as store:
                for _ in range(20):
                    api.build(prepared, store, processes=False)

        for number, weight in enumerate((0.25, 0.75)):
            recipe = linear(tmp_path, {models / "base": 0.5, models / "happy": weight}, f"{number}.yml")
            build(recipe, "-o", tmp_path / f"whole{number}/out", "--store", tmp_path / f"store{number}")
            whole.append(contents(tmp_path / f"whole{number}/out"))
        with ThreadPoolExecutor(2) as both:
            for done in [both.submit(publish, number) for number in (0, 1)]:
                done.result()
        assert contents(tmp_path / "out") in whole
        assert not list(tmp_path.glob("out.*"))


class TestFolders:
    def test_a_folder_that_is_not_ours_stays_as_it_is(self, args: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/model.safetensors").write_bytes(b"mine")
        assert fails(*args)[:2] == (5, "KB504")
        assert contents(tmp_path / "out") == {"model.safetensors": b"mine"}
        (tmp_path / "out/model.safetensors").unlink()
        build(*args)  # an empty folder is nobody's

    def test_a_file_where_the_folder_goes_stays_as_it_is(self, args: Any, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        assert fails(*args)[:2] == (5, "KB504")
        assert (tmp_path / "out").read_text() == "mine"

    def test_what_the_user_put_into_the_folder_survives(self, args: Any, recipe: str, tmp_path: Path) -> None:
        build(*args)
        out = tmp_path / "out"
        (out / "evals/deep").mkdir(parents=True)
        (out / "evals/deep/scores.csv").write_text("1,2")
        (out / "evals/empty").mkdir()
        (out / "notes.txt").write_text("good at poems")
        os.symlink("notes.txt", out / "link")
        os.symlink("/nowhere", out / "dangling")
        os.symlink("evals", out / "folder")
        out.chmod(0o750)
        Path(recipe).write_text(Path(recipe).read_text().replace("0.5", "0.25"))
        build(*args)
        assert (out / "evals/deep/scores.csv").read_text() == "1,2"
        assert (out / "evals/empty").is_dir()
        assert (out / "notes.txt").read_text() == "good at poems"
        assert {name: os.readlink(out / name) for name in ("link", "dangling", "folder")} == {
            "link": "notes.txt",
            "dangling": "/nowhere",
            "folder": "evals",
        }
        assert out.stat().st_mode & 0o777 == 0o750

    def test_a_link_to_a_folder_stays_a_link(self, args: Any, recipe: str, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        os.symlink("disk", tmp_path / "out")
        build(*args)
        Path(recipe).write_text(Path(recipe).read_text().replace("0.5", "0.25"))
        build(*args)
        assert os.readlink(tmp_path / "out") == "disk"
        assert (tmp_path / "disk/model.safetensors").is_file()

    def test_the_folder_of_a_source_or_one_in_it_is_refused(self, args: Any, models: Path, tmp_path: Path) -> None:
        build(*args)
        chained = linear(tmp_path, {tmp_path / "out": 1.0}, "chained.yml")
        for folder in (tmp_path / "out", tmp_path / "out/more"):
            assert fails(chained, "-o", folder, "--store", tmp_path / "store")[:2] == (3, "KB114")

    def test_two_outputs_in_one_folder_are_refused(self, models: Path, tmp_path: Path) -> None:
        stage = {"merge_method": "passthrough", "models": [{"model": str(models / "base")}]}
        form = {"kittybuild": 1, "stages": {"one": stage, "two": stage}}
        outputs = {"one": {"folder": "out"}, "two": {"folder": "./out/"}}
        recipe = write_recipe(tmp_path, {**form, "outputs": outputs})
        assert fails(recipe, "--store", tmp_path / "store")[:2] == (3, "KB114")

    @pytest.mark.parametrize("left", ["kittybuild-new", "kittybuild-old"])
    def test_what_a_swap_left_that_was_cut_short_is_put_right(
        self, left: str, args: Any, recipe: str, tmp_path: Path
    ) -> None:
        """Without an exchange of folders the old one is aside for a moment; with it, it has the new one's name."""
        build(*args)
        (tmp_path / "out/notes.txt").write_text("mine")
        if left == "kittybuild-old":
            (tmp_path / "out").rename(tmp_path / "out.kittybuild-old")
        else:
            shutil.copytree(tmp_path / "out", tmp_path / "out.kittybuild-new")
        build(*args)
        assert (tmp_path / "out/notes.txt").read_text() == "mine"
        assert not list(tmp_path.glob("out.*"))
