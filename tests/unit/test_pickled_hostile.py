"""Torch files that lie or attack: each is an error with a code, found at once; nothing in them is ever run."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.checkpoint import pickle_data, pickled, zipped
from kittybuild.checkpoint.source import Entry
from kittybuild.errors import SourceError
from tests.torchfiles import (
    LAYOUTS,
    content,
    machine,
    named,
    number,
    one,
    read,
    rebuilt,
    refused,
    save,
    storage,
    text,
    zip_of,
)


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class EvilState:
    """Runs a command when its state is set."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return collections.OrderedDict, (), {"x": Evil(self.mark)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda evil: evil,
        lambda evil: {"x": torch.ones(2), "evil": evil},
        lambda evil: {evil: torch.ones(2)} if evil.__hash__ else {},
        lambda evil: {"x": torch.nn.Parameter(torch.ones(2)), "y": [({"z": evil},)]},
    ],
    ids=["alone", "beside", "key", "deep"],
)
@pytest.mark.parametrize("kind", [Evil, EvilState])
def test_a_planted_command_never_runs(
    tmp_path: Path, layout: str, wrap: Callable[[Any], Any], kind: Callable[[Path], Any]
) -> None:
    mark = tmp_path / "mark"
    error = refused(save(tmp_path / "x.bin", wrap(kind(mark)), layout), "KB221")
    assert "'posix.system'" in error.message
    assert not mark.exists()
    with (tmp_path / "x.bin").open("rb") as file, pytest.raises(Exception):  # noqa: B017, PT011
        torch.load(file, weights_only=False)["nothing"]
    assert mark.exists(), "or the test shows nothing"


@pytest.mark.parametrize(
    "value",
    [
        {"args": collections.defaultdict(int)},
        {"args": pytest.param},
        {"x": torch.ones(2).numpy()},
        {"x": torch.device("cpu")},
        {"x": torch.ones(2).to_sparse()},
        torch.nn.Linear(2, 2),
    ],
    ids=range(6),
)
def test_every_other_global_is_named(tmp_path: Path, value: Any) -> None:
    assert "its pickle names '" in refused(save(tmp_path / "x.bin", value), "KB221").message


def test_pickles_made_by_hand_are_read(tmp_path: Path) -> None:
    """So that those below fail for what is wrong in them."""
    entry = read(zip_of(tmp_path / "x.pt", one(rebuilt())))["x"]
    assert (entry.spec.shape, content(entry)) == ((4,), bytes(16))


BIG = number(1 << 62)


@pytest.mark.parametrize(
    ("pickled", "code", "words"),
    [
        (b"", "KB220", "goes on after 0 bytes"),
        (b"\x80\x02.", "KB220", "pop from empty list"),
        (machine(b"}", b"."), "KB224", "no tensors"),
        (b"\x80\x02}", "KB220", "goes on after 3 bytes"),
        (machine(b"}", text("x"), b"s"), "KB220", "index out of range"),
        (machine(b"h\x07"), "KB220", "7"),
        (machine(b"e"), "KB220", "pop from empty"),
        (machine(b"\xff"), "KB220", "opcode b'\\xff' unknown"),
        (machine(b"(i"), "KB220", "goes on after 5 bytes"),
        (machine(b"I1\n"), "KB220", "opcode INT"),
        (machine(b"X\xff\xff\xff\x7fabc"), "KB220", "goes on after"),
        (machine(b"\x8d" + b"\xff" * 8), "KB220", "byte count > sys.maxsize"),
        (machine(b"\x8b\xff\xff\xff\x7f"), "KB220", "goes on after"),
        (machine(b"\x8b\xff\xff\xff\xff"), "KB220", "byte count < 0"),
        (machine(named("torch.FloatStorage"), b")R"), "KB220", "a call of torch.FloatStorage, which is no function"),
        (machine(named("torch.Size"), b"]R"), "KB220", "a call without arguments"),
        (machine(named("torch.Size"), b")R"), "KB220", "a size of no numbers"),
        (machine(named("collections.OrderedDict"), b"]K\x01a\x85R"), "KB220", "an OrderedDict"),
        (machine(b"]K\x01}b"), "KB222", "sets attributes"),
        (machine(b"]K\x01K\x02s"), "KB220", "no dict"),
        (machine(b"}K\x01a"), "KB220", "no list"),
        (machine(b"}(K\x01u"), "KB220", "a key without a value"),
        (machine(text("x"), b"Q"), "KB220", "no storage"),
        (machine(b"K\x01K\x02\x93"), "KB220", "a global without a name"),
        (machine(text("os"), text("system"), b"\x93"), "KB221", "'os.system'"),
        (machine(named("builtins.eval")), "KB221", "'builtins.eval'"),
        (machine(named("torch.FloatStorage" + "x" * 1000)), "KB221", "'torch.FloatStoragexxx"),
        (machine(b"(i__builtin__\neval\n"), "KB220", "opcode INST"),
        (machine(named("collections.OrderedDict"), b")\x81"), "KB220", "opcode NEWOBJ"),
        (machine(b"\x82\x01"), "KB220", "opcode EXT1"),
        (one(rebuilt(stored=storage("torch.Tensor"))), "KB220", "a storage of the type torch.Tensor"),
        (one(rebuilt(stored=storage(count=number(-1)))), "KB220", "no storage"),
        (one(rebuilt(stored=storage(count=number(1 << 63)))), "KB220", "no storage"),
        (one(rebuilt(stored=storage(count=number(5)))), "KB220", "the storage '0' of 20 bytes is of 16 bytes"),
        (one(rebuilt(stored=storage(key=text("../0")))), "KB220", "the storage '../0' of 16 bytes is not there"),
        (one(rebuilt(stored=storage("torch.ComplexFloatStorage"))), "KB203", "'torch.ComplexFloatStorage'"),
        (one(rebuilt(stored=b"N")), "KB220", "a tensor without storage"),
        (one(rebuilt(at=number(1))), "KB223", "ends at element 5 of the 4"),
        (one(rebuilt(at=number(-1))), "KB220", "impossible size"),
        (one(rebuilt(at=BIG)), "KB223", f"ends at element {(1 << 62) + 4} of the 4"),
        (one(rebuilt(at=b"\x88")), "KB220", "impossible size"),
        (one(rebuilt(size=number(5) + b"\x85")), "KB223", "ends at element 5 of the 4"),
        (one(rebuilt(size=number(-4) + b"\x85")), "KB220", "impossible size"),
        (one(rebuilt(size=text("4") + b"\x85")), "KB220", "impossible size"),
        (one(rebuilt(stride=number(2) + b"\x85")), "KB223", "ends at element 7 of the 4"),
        (one(rebuilt(stride=number(-1) + b"\x85")), "KB220", "impossible size"),
        (one(rebuilt(stride=BIG + b"\x85")), "KB223", "of the 4"),
        (one(rebuilt(stride=b")")), "KB220", "impossible size"),
        (one(rebuilt(size=BIG + b"\x85", stride=number(0) + b"\x85")), "KB222", "repeats the 1 elements"),
        (one(rebuilt(size=BIG + BIG + b"\x86", stride=number(0) * 2 + b"\x86")), "KB222", "repeats"),
        (one(rebuilt(size=b"(" + number(1) * 65 + b"t", stride=b"(" + number(1) * 65 + b"t")), "KB220", "impossible"),
        (one(rebuilt(more=b"\x89}}" + text("neg") + b"\x88s")), "KB222", "a lazy conjugate or negative"),
        (one(rebuilt(more=b"\x89}NN")), "KB220", "a tensor without storage"),
        (machine(b"}", text("x"), rebuilt(), b"s", text("y"), rebuilt(stored=storage("torch.IntStorage")), b"s"),
         "KB220", "the storage '0' is described in two ways"),
    ],
    ids=range(54),
)  # fmt: skip
def test_a_pickle_that_lies_is_an_error(tmp_path: Path, pickled: bytes, code: str, words: str) -> None:
    path = zip_of(tmp_path / "x.pt", pickled)
    if words == "no tensors":
        assert read(path) == {}
        return
    assert words in refused(path, code).message


def test_a_pickle_of_too_many_steps_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_data, "MOST_STEPS", 100)
    assert "more than the 100 steps" in refused(zip_of(tmp_path / "x.pt", machine(b"]" * 200)), "KB220").message


def test_numbers_too_large_to_print_do_not_crash(tmp_path: Path) -> None:
    huge = b"\x8b" + struct.pack("<i", 1 << 16) + b"\x7f" * (1 << 16)
    refused(zip_of(tmp_path / "x.pt", one(rebuilt(size=huge + b"\x85"))), "KB220")
    refused(zip_of(tmp_path / "x.pt", machine(b"}", huge, rebuilt(), b"s")), "KB224")


def test_a_nest_of_many_tuples_is_an_error(tmp_path: Path) -> None:
    nest = b"K\x01" + b"\x85" * 200_000
    refused(zip_of(tmp_path / "x.pt", machine(b"}", nest, rebuilt(), b"s")), "KB224")
    refused(zip_of(tmp_path / "x.pt", machine(b"}", text("x"), nest, b"s")), "KB224")


class TestZip:
    def test_what_torch_did_not_store_is_refused(self, tmp_path: Path) -> None:
        source = save(tmp_path / "x.pt", {"x": torch.zeros(1 << 16)})
        packed = tmp_path / "packed.pt"
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        assert "compressed" in refused(packed, "KB222").message

    def test_big_endian_is_refused(self, tmp_path: Path) -> None:
        assert "big-endian" in refused(zip_of(tmp_path / "x.pt", one(rebuilt()), byteorder=b"big"), "KB222").message

    def test_a_script_is_refused(self, tmp_path: Path) -> None:
        path = zip_of(tmp_path / "x.pt", one(rebuilt()), **{"constants.pkl": machine(b")"), "code/x.py": b""})
        assert "TorchScript" in refused(path, "KB222").message

    def test_any_other_zip_file_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
            file.writestr("word/document.xml", "x")
        assert "no data.pkl" in refused(tmp_path / "x.pt", "KB220").message

    def test_members_that_share_bytes_are_refused(self, tmp_path: Path) -> None:
        path = zip_of(tmp_path / "x.pt", one(rebuilt()))
        content = bytearray(path.read_bytes())
        entries = [at for at in range(len(content)) if content[at : at + 4] == b"PK\x01\x02"]
        content[entries[-1] + 42 : entries[-1] + 46] = content[entries[-2] + 42 : entries[-2] + 46]
        path.write_bytes(content)
        assert "overlaps with" in refused(path, "KB223").message

    def test_a_member_past_the_end_is_refused(self, tmp_path: Path) -> None:
        path = zip_of(tmp_path / "x.pt", one(rebuilt()))
        content = bytearray(path.read_bytes())
        last = content.rindex(b"PK\x01\x02")
        content[last + 20 : last + 28] = struct.pack("<II", 1 << 30, 1 << 30)
        path.write_bytes(content)
        assert "ends at byte" in refused(path, "KB223").message

    def test_a_directory_of_gigabytes_is_not_read(self, tmp_path: Path) -> None:
        path, claimed = tmp_path / "x.pt", 1 << 31
        with path.open("wb") as file:
            file.write(b"PK\x03\x04")
            file.truncate(claimed)
            file.seek(claimed)
            file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, claimed - 4, 4, 0))
        assert f"goes on after {zipped.LARGEST_DIRECTORY} bytes" in refused(path, "KB220").message

    def test_a_pickle_of_gigabytes_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pickled, "LONGEST_PICKLE", 1 << 10)
        path = zip_of(tmp_path / "x.pt", machine(b"}", text("x" * 2000), b"Ns"))
        assert "goes on after 1024 bytes" in refused(path, "KB220").message


class TestLegacy:
    def file(self, tmp_path: Path, **changes: Any) -> Path:
        """A legacy file of one storage with some of its five pickles, or the count of its storage, changed."""
        parts: dict[str, Any] = {"magic": 0x1950A86A20F9469CFC6C, "version": 1001, "system": {"little_endian": True}}
        parts |= {"value": one(rebuilt()), "keys": ["0"], "count": struct.pack("<q", 4), "data": bytes(16)} | changes
        raw = [part if isinstance(part, bytes) else pickle.dumps(part, 2) for part in parts.values()]
        (tmp_path / "x.bin").write_bytes(b"".join(raw))
        return tmp_path / "x.bin"

    def test_one_made_by_hand_is_read(self, tmp_path: Path) -> None:
        assert content(read(self.file(tmp_path, data=bytes(range(16))))["x"]) == bytes(range(16))

    @pytest.mark.parametrize(
        ("changes", "code", "words"),
        [
            ({"magic": 7}, "KB220", "none of torch.save"),
            ({"version": 1002}, "KB222", "another version"),
            ({"system": {"little_endian": False}}, "KB222", "big-endian"),
            ({"system": []}, "KB222", "big-endian"),
            ({"keys": []}, "KB220", "not those of its tensors"),
            ({"keys": ["0", "1"]}, "KB220", "not those of its tensors"),
            ({"keys": ["0", "0"]}, "KB220", "no list"),
            ({"keys": "0"}, "KB220", "no list"),
            ({"count": struct.pack("<q", 5)}, "KB220", "does not have 4 elements"),
            ({"count": b""}, "KB220", "does not have 4 elements"),
            ({"data": bytes(15)}, "KB220", "describes"),
            ({"data": bytes(17)}, "KB220", "describes"),
            ({"system": Evil(Path("mark"))}, "KB221", "'posix.system'"),
            ({"keys": Evil(Path("mark"))}, "KB221", "'posix.system'"),
            ({"keys": machine(text("x"), b"Q")}, "KB220", "a persistent id where none can be"),
        ],
        ids=range(15),
    )
    def test_one_that_lies_is_an_error(self, tmp_path: Path, changes: dict[str, Any], code: str, words: str) -> None:
        assert words in refused(self.file(tmp_path, **changes), code).message

    def test_storages_that_are_views_of_others_are_refused(self, tmp_path: Path) -> None:
        view = b"(" + text("1") + number(0) + number(4) + b"t"
        stored = (
            b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + number(4) + view + b"tQ"
        )
        assert "before 0.4" in refused(self.file(tmp_path, value=one(rebuilt(stored=stored))), "KB222").message

    def test_a_pickle_that_never_ends_is_not_read_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pickled, "LONGEST_PICKLE", 1 << 10)
        path = self.file(tmp_path, value=machine(b"B" + struct.pack("<I", 5000) + bytes(5000)))
        assert "goes on after 1024 bytes" in refused(path, "KB220").message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "neither a zip file nor a pickle"),
        (b"\x93NUMPY\x01\x00", "neither"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-lfs"),
        (b"PK\x03\x04", "not a zip file"),
    ],
)
def test_any_other_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    error = refused(tmp_path / "x.bin", "KB220")
    assert words in error.message
    assert ("git lfs pull" in str(error.hint)) == content.startswith(b"version")


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.bin", "KB201")
    refused(tmp_path, "KB201")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path, layout: str) -> None:
    path = save(tmp_path / "x.pt", {"x": torch.arange(9.0), "y": torch.ones(2, 2).t()}, layout)
    for size in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, size)
        refused(path, "KB220")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    value = {"state_dict": {"x": torch.arange(6.0).reshape(2, 3).t(), "y": torch.ones(2, dtype=torch.int64)}, "n": 1}
    path = tmp_path_factory.mktemp("sound") / "x.pt"
    return {layout: save(path, value, layout).read_bytes() for layout in LAYOUTS}


def outcome(path: Path) -> dict[str, Entry] | str:
    """The tensors of a file, or the code of its error: there is no third."""
    try:
        return read(path)
    except SourceError as error:
        return error.code


CODES = ("KB203", *(f"KB22{number}" for number in range(5)))


@given(data=st.data(), layout=st.sampled_from(LAYOUTS))
def test_any_damage_is_an_error_or_tensors_inside_the_file(
    tmp_path_factory: pytest.TempPathFactory, sound: dict[str, bytes], data: st.DataObject, layout: str
) -> None:
    changed = bytearray(sound[layout])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed)))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                changed[at : at + 1] = data.draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del changed[at : at + data.draw(st.integers(1, 40))]
            case _:
                changed[at:at] = data.draw(st.binary(min_size=1, max_size=12))
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(changed)
    found = outcome(path)
    if isinstance(found, str):
        assert found in CODES
        return
    for entry in found.values():
        assert 0 <= entry.offset <= entry.offset + entry.nbytes <= len(changed)
        assert len(content(entry)) == entry.spec.nbytes <= entry.nbytes


PARTS = [*(bytes([code]) for code in range(256)), rebuilt(), text("x"), storage(), named("torch.Size"), number(7)]


@given(steps=st.lists(st.sampled_from(PARTS), max_size=40))
def test_any_pickle_is_a_value_or_an_error(tmp_path_factory: pytest.TempPathFactory, steps: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pt"
    for pickled_bytes in (machine(*steps), one(b"".join(steps)), one(rebuilt() + b"s" + b"".join(steps))):
        found = outcome(zip_of(path, pickled_bytes))
        assert isinstance(found, dict) or found in CODES
