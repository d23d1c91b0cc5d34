"""Methods from outside: loaded from files and packages, keyed by version or source, refused where they are unsound."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest

from kittybuild.builders import plugins
from kittybuild.builders.plugins import load
from kittybuild.builders.registry import BUILTIN
from kittybuild.digest import Digest
from kittybuild.errors import UsageError
from tests.planning import errors_of, llama, planned, step

SOURCE = """\
from dataclasses import dataclass

from kittybuild.builders.base import Builder
from kittybuild.builders.merge.linear import LINEAR
from kittybuild.model.method import Method


@dataclass(frozen=True)
class Nothing:
    word: str = "nothing"


def _prepare(job):
    return lambda block: block.inputs[0]


FIRST = Builder("first", 0, _prepare, scratch=0, method=Method("first", "First", "", (), "ordinary"))
AGAIN = FIRST
"""


def file_of(folder: Path, source: str = SOURCE, name: str = "mine.py", **replaced: str) -> str:
    for old, new in replaced.items():
        source = source.replace(old, new)
    path = folder / name
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return str(path)


def refusals(*files: str) -> list[tuple[str, str, str]]:
    return [(error.code, str(error.at), error.message) for error in errors_of(load, files)]


class TestFiles:
    def test_without_any_they_are_ours(self) -> None:
        assert load() is BUILTIN
        assert BUILTIN.files == ()

    def test_a_file_adds_what_it_defines_at_its_top_level_but_not_what_it_imports(self, tmp_path: Path) -> None:
        file = file_of(tmp_path)
        builders = load([file])
        added = builders.by_class.keys() - BUILTIN.by_class.keys()
        assert added == {("kitty-1", "first")}
        assert builders.files == (file,)

    def test_another_process_loads_the_same(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file_of(tmp_path)
        monkeypatch.chdir(tmp_path)
        builders = load(["mine.py"])
        monkeypatch.chdir("/")
        assert builders.files is not None
        again = load(builders.files)
        assert {key: b.version for key, b in again.by_class.items()} == {
            key: b.version for key, b in builders.by_class.items()
        }

    def test_what_is_put_together_by_hand_can_no_other_process_load(self, tmp_path: Path) -> None:
        assert BUILTIN.plus(load([file_of(tmp_path)])["first"]).files is None

    def test_several_files(self, tmp_path: Path) -> None:
        one = file_of(tmp_path)
        other = file_of(tmp_path, name="other.py", first="second")
        assert {"first", "second"} <= {method.name for method in load([one, other]).methods()}

    def test_a_recipe_names_its_method(self, tmp_path: Path) -> None:
        models = {"a": llama(), "b": llama()}
        text = "merge_method: first\nmodels: [{model: a}, {model: b}]"
        assert [error.code for error in errors_of(planned, tmp_path, models, text)] == ["KB104"]
        plan = planned(tmp_path, models, text, builders=load([file_of(tmp_path)]))
        assert step(plan, "model.norm.weight").builder == "first"


class TestVersions:
    def test_without_a_version_the_source_counts(self, tmp_path: Path) -> None:
        builder = load([file_of(tmp_path)])["first"]
        assert builder.version == f"source {Digest.of((tmp_path / 'mine.py').read_bytes())}"
        changed = load([file_of(tmp_path, SOURCE + "# a remark\n")])["first"]
        assert changed.version != builder.version

    def test_a_version_counts_alone(self, tmp_path: Path) -> None:
        builders = load([file_of(tmp_path, **{'"first", 0': '"first", 3'})])
        assert builders["first"].version == 3

    def test_it_is_in_the_key(self, tmp_path: Path) -> None:
        keys = set()
        models = {"a": llama(), "b": llama()}
        for source in (SOURCE, SOURCE + "# a remark\n"):
            builders = load([file_of(tmp_path, source)])
            plan = planned(tmp_path, models, "merge_method: first\nmodels: [{model: a}]", builders=builders)
            keys.add(step(plan, "model.norm.weight").version)
        assert len(keys) == 2


class TestRefusals:
    @pytest.mark.parametrize(
        ("replaced", "words"),
        [
            ({"FIRST = Builder": "FIRST = ("}, "cannot be loaded: SyntaxError"),
            ({"import Method": "import Methods"}, "cannot be loaded: ImportError: cannot import name 'Methods'"),
            ({"def _prepare(job):": "1 / 0\n\n\ndef _prepare(job):"}, "cannot be loaded: ZeroDivisionError"),
            (
                {"FIRST = Builder(": "FIRST = str(Builder(", '"ordinary"))': '"ordinary")))'},
                "the file defines no Builder",
            ),
            ({'Method("first"': 'Method("last"'}, "'first' has no Method of its own name"),
            ({', method=Method("first", "First", "", (), "ordinary")': ""}, "'first' has no Method of its own name"),
            ({"scratch=0": "numerics='mine-1'"}, "'first' is of the class 'mine-1'"),
        ],
    )
    def test_an_unsound_file_is_refused(self, replaced: Mapping[str, str], words: str, tmp_path: Path) -> None:
        file = file_of(tmp_path, **replaced)
        ((code, at, message),) = refusals(file)
        assert (code, at) == ("KB007", file)
        assert message.startswith(words)

    @pytest.mark.parametrize("name", ["none.py", "mine.txt", "."])
    def test_what_is_no_python_file_is_refused(self, name: str, tmp_path: Path) -> None:
        if name == "mine.txt":
            file_of(tmp_path, name=name)
        assert refusals(str(tmp_path / name)) == [("KB007", str(tmp_path / name), "not a Python file")]

    def test_a_name_of_ours_is_taken(self, tmp_path: Path) -> None:
        file = file_of(tmp_path, first="ties")
        assert refusals(file) == [("KB008", file, "'ties' is the name of a builder of kittybuild itself")]

    def test_a_name_of_another_plug_in_is_taken(self, tmp_path: Path) -> None:
        one, other = file_of(tmp_path), file_of(tmp_path, name="other.py")
        assert refusals(one, other) == [("KB008", other, f"'first' is the name of a builder of {one}")]

    def test_all_are_told_at_once(self, tmp_path: Path) -> None:
        files = [file_of(tmp_path, first="ties"), str(tmp_path / "none.py")]
        assert [code for code, _, _ in refusals(*files)] == ["KB008", "KB007"]

    def test_a_method_without_source_needs_a_version(self, tmp_path: Path) -> None:
        source = SOURCE.replace("def _prepare(job):", "exec('def _prepare(job): ...')\n\n\ndef _other(job):")
        ((code, _, message),) = refusals(file_of(tmp_path, source))
        assert code == "KB007"
        assert "has no version, and no source file" in message


class TestPackages:
    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch, folder: Path, target: str) -> None:
        """As if a package with that entry point were installed."""
        file_of(folder, name="kittens.py")
        monkeypatch.syspath_prepend(folder)
        entry = metadata.EntryPoint("cats", f"kittens:{target}", plugins.GROUP)
        monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == plugins.GROUP else [])

    @pytest.mark.parametrize("target", ["FIRST", "BOTH"])
    def test_an_entry_point_is_a_builder_or_several(
        self, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.install(monkeypatch, tmp_path, target)
        more = "\n\nBOTH = [FIRST, replace(FIRST, name='second', method=replace(FIRST.method, name='second'))]\n"
        (tmp_path / "kittens.py").write_text("from dataclasses import replace\n" + SOURCE + more, encoding="utf-8")
        names = {method.name for method in load().methods()} - {method.name for method in BUILTIN.methods()}
        assert names == ({"first"} if target == "FIRST" else {"first", "second"})
        assert load().files == ()

    @pytest.mark.parametrize("target", ["Nothing", "nowhere"])
    def test_anything_else_is_refused(self, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.install(monkeypatch, tmp_path, target)
        with pytest.raises(UsageError) as caught:
            load()
        assert (caught.value.code, caught.value.at) == ("KB007", f"kittens:{target}")
