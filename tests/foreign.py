"""Bytes of strangers for tests: valid files with something wrong, and a watch over who reads them.

`Foreign("config", "config.json", JSON, make, parse).tried(folder)` has a reader read such bytes. Whoever executes,
writes, connects, hangs or takes memory meanwhile fails, and so does an error without a code.
`KITTYBUILD_FUZZ=20000 pytest tests/property -k foreign` tries so many of each, other ones each time.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kittybuild.errors import KittybuildError, each

Draw = Callable[[Any], Any]
Mutate = Callable[[Draw, bytes], bytes]

SECONDS = 5.0
"""Of one reader's processor time: a hundred times what any of them needs."""
ROOM = 48 << 20
PER_BYTE = 100
"""What a reader may take: so much, and so many times the size of what it reads."""

_NUMBERS = (0, 1, 2, 127, 128, 255, (1 << 15) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)
_PIECES = (
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\n", b'"', b"{", b"}", b"[", b"]", b":", b",", b"- ", b"&a ", b"*a", b"<<: ",
    b"!!python/object:os.system ", b"NaN", b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"null", b"../", b"/etc/passwd",
    b"[" * 3000, b"{" * 3000, b'{"":' * 3000, b"\x80\x04\x95", b"cos\nsystem\n(S'true'\ntR.", b"PK\x03\x04", b"\r",
)  # fmt: skip
_VALUES = (
    "null", "true", "false", "0", "1", "-1", "2", "1.5", "-0.0", "1e400", "NaN", "-Infinity", "9" * 25, "9" * 5000,
    str(1 << 31), str((1 << 63) - 1), str(1 << 64), '""', '"x"', '"\\ud800"', '"a\\u0000b"', '"../../x"',
    '"' + "long" * 2000 + '"', '"' + "0" * 64 + '"', "[]", "{}", "[[]]", '[null, {}]', '[1, "x"]', '{"a": 1}',
    '{"": {"": []}}', "[" * 120 + "]" * 120, "[" * 20_000 + "]" * 20_000, '{"a":' * 20_000 + "1" + "}" * 20_000,
)  # fmt: skip


@st.composite
def mutated(draw: Draw, example: bytes, mutate: Mutate) -> bytes:
    """An example with a few things wrong, or now and then bytes that never were one."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=100))
    return mutate(draw, example)


def BYTES(draw: Draw, example: bytes) -> bytes:
    """Flipped, cut, repeated, moved, and put in."""
    data = bytearray(example)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from((1, 2, 4, 8, 16, 64, 1000)))
        match draw(st.integers(0, 6)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                del data[at:]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                to = draw(st.integers(0, len(data)))
                data[to:to] = data[at : at + length]
            case 5:
                size = draw(st.sampled_from((1, 2, 4, 8)))
                number = draw(st.sampled_from(_NUMBERS)) & (1 << 8 * size) - 1
                data[at : at + size] = number.to_bytes(size, draw(st.sampled_from(("little", "big"))))
            case _:
                data[at:at] = draw(st.sampled_from(_PIECES))
    return bytes(data)


def JSON(draw: Draw, example: bytes) -> bytes:
    """Keys and items left out, doubled, renamed, moved, and of another type; or as BYTES."""
    if draw(st.integers(0, 3)) == 0:
        return BYTES(draw, example)
    tree = [None, _tree(json.loads(example))]
    for _ in range(draw(st.integers(1, 3))):
        spots = list(_spots(tree))
        place, at = draw(st.sampled_from(spots))
        other, there = draw(st.sampled_from(spots))
        match draw(st.integers(0, 6)):
            case 0 if place is not tree:
                del place[at]
            case 1 if place is not tree:
                place.insert(at, place[at])
            case 2 if isinstance(place, _Object):
                place[at] = (draw(st.sampled_from([_NAMES[0], *_NAMES])), place[at][1])
            case 3:
                _put(place, at, _got(other, there))
            case _:
                _put(place, at, draw(st.sampled_from(_VALUES)))
    return _text(tree[1]).encode()


def FRAMED(draw: Draw, example: bytes) -> bytes:
    """As JSON, of the header of a safetensors file; its length is right, or as BYTES."""
    if draw(st.integers(0, 3)) == 0:
        return BYTES(draw, example)
    end = 8 + int.from_bytes(example[:8], "little")
    header = JSON(draw, example[8:end])
    return len(header).to_bytes(8, "little") + header + example[end:]


class _Object(list):  # type: ignore[type-arg]
    """The pairs of a JSON object: unlike a dict, with keys twice."""


_NAMES = (
    '""',
    '"(.+)+!"',
    '"x"',
    '"\\ud800"',
    '"../x"',
    '"/x"',
    '"a\\u0000"',
    '"__metadata__"',
    '"' + "n" * 3000 + '"',
    '"0"',
)


def _tree(value: Any) -> Any:
    if isinstance(value, dict):
        return _Object((json.dumps(key), _tree(item)) for key, item in value.items())
    return [_tree(item) for item in value] if isinstance(value, list) else json.dumps(value)


def _text(tree: Any) -> str:
    if isinstance(tree, _Object):
        return "{" + ", ".join(f"{key}: {_text(item)}" for key, item in tree) + "}"
    return tree if isinstance(tree, str) else "[" + ", ".join(map(_text, tree)) + "]"


def _spots(tree: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Every place of a value: the list that it is in, and where."""
    todo = [(tree, 1)]
    while todo:
        place, at = todo.pop()
        yield place, at
        inner = _got(place, at)
        todo += [(inner, number) for number in range(len(inner))] if isinstance(inner, list) else []


def _got(place: list[Any], at: int) -> Any:
    return place[at][1] if isinstance(place, _Object) else place[at]


def _put(place: list[Any], at: int, value: Any) -> None:
    copy = _copied(value)
    place[at] = (place[at][0], copy) if isinstance(place, _Object) else copy


def _copied(tree: Any) -> Any:
    if isinstance(tree, _Object):
        return _Object((key, _copied(item)) for key, item in tree)
    return tree if isinstance(tree, str) else [_copied(item) for item in tree]


# ---- the watch

_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "socket.connect",
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime",
)  # fmt: skip
_seen: list[list[str]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in _FORBIDDEN:
            _seen[-1].append(f"{event} {str(args)[:200]}")


sys.addaudithook(_hook)


@contextmanager
def watched(size: int, *, writes: bool = False) -> Iterator[None]:
    """Whoever reads `size` bytes in this block executes nothing, writes nothing (unless `writes`), and soon ends."""
    seen: list[str] = []
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # of our own modules, imported on the way
    tracemalloc.start()
    began = time.thread_time()
    _seen.append(seen)
    try:
        yield
    finally:
        _seen.pop()
        took, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        sys.dont_write_bytecode = bytecode
    assert writes or not seen, f"while it was read: {seen}"
    assert took < SECONDS, f"it took {took:.1f} s"
    assert peak < ROOM + PER_BYTE * size, f"it took {peak >> 20} MB for {size} bytes"


FUZZ = int(os.environ.get("KITTYBUILD_FUZZ", "0"))


@dataclass(frozen=True)
class Foreign:
    """A file of a stranger's, as a pattern: `make` a folder with a valid one, and `parse` the folder.

    `alone`: other errors of the parser than ours; `writes`: whether it may write.
    """

    name: str
    file: str
    mutate: Mutate
    make: Callable[[Path], object]
    parse: Callable[[Path], object]
    examples: int = 60
    alone: tuple[type[Exception], ...] = ()
    writes: bool = False

    def __str__(self) -> str:
        return self.name

    def errors(self, folder: Path) -> tuple[KittybuildError, ...]:
        """The errors of ours that parsing raises, each with a text that can be written."""
        try:
            self.parse(folder)
        except KittybuildError as error:
            str(error).encode()
            return each(error)
        except self.alone as error:
            str(error).encode()
        return ()

    def tried(self, folder: Path) -> None:
        """Parse the valid file, and then many that are not."""
        self.make(folder)
        path = next(folder.glob(self.file))
        example = path.read_bytes()
        self.parse(folder)

        @settings(max_examples=FUZZ or self.examples, derandomize=not FUZZ, database=None)
        @given(mutated(example, self.mutate))
        def holds(data: bytes) -> None:
            path.write_bytes(data)
            with watched(len(data) + len(example), writes=self.writes):
                errors = self.errors(folder)
            assert all(re.fullmatch("KB[0-9]{3}", error.code) for error in errors)

        holds()
