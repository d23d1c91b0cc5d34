"""A pickle read as data. Nothing is imported and nothing is run: a global is a name that the caller knows, or an error.

Only what `pickle` writes in its binary protocols is read, and only so much of it as any state dict needs.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any, cast

from kittybuild.checkpoint.bounded import Bounded
from kittybuild.errors import SourceError

MOST_STEPS = 2_000_000
LARGEST_KEY = 1 << 63


@dataclass(frozen=True, slots=True, eq=False)
class Known:
    """A global that may be named. `call`: what stands for calling it, a function of ours over the arguments."""

    name: str
    call: Callable[[Sequence[Any]], Any] | None = None


class Unreadable(ValueError):
    """A value in the pickle that is sound, but of a kind that we do not read."""


def read_pickle(
    path: str, file: Bounded, known: Mapping[str, Known], stored: Callable[[Any], Any] | None = None
) -> Any:
    """The value of the pickle that begins here in `file`: plain Python values, `known` globals and what they make.

    An OrderedDict is a dict here, a set a list. `stored` turns a persistent id into a value. Raises SourceError KB220
    for what is damaged, KB221 for any other global, KB222 for what is of another kind.
    """
    machine = _Machine(known, stored)
    try:
        for step, (opcode, arg, _) in enumerate(pickletools.genops(cast("IO[bytes]", _Stream(file)))):
            if step == MOST_STEPS:
                raise ValueError(f"it has more than the {MOST_STEPS} steps allowed")
            machine.step(opcode.name, arg)
        return machine.stack.pop()
    except _Forbidden as error:
        hint = "if you trust it: load it with torch, and save its state dict as safetensors"
        message = f"its pickle names {error}, which is no part of a state dict; loading it would run code"
        raise SourceError("KB221", message, at=path, hint=hint) from None
    except Unreadable as error:
        hint = "load it with torch, and save its state dict as safetensors"
        raise SourceError("KB222", str(error), at=path, hint=hint) from None
    except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
        message = f"its pickle is damaged: {str(error)[:200] or type(error).__name__}"
        raise SourceError("KB220", message, at=path, hint="download or copy it again") from error


class _Forbidden(ValueError):
    """A global that is not known."""


class _Stream:
    """Only what `genops` needs: without `tell`, it does not ask for the place of each step."""

    def __init__(self, file: Bounded) -> None:
        self.read, self.readline = file.read, file.readline


class _Machine:
    """The stack machine of pickle, as far as values need it."""

    def __init__(self, known: Mapping[str, Known], stored: Callable[[Any], Any] | None) -> None:
        self.known, self.stored = known, stored
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, arg: Any) -> None:
        """One opcode."""
        if name in _PUSHED:
            self.stack.append(arg)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _STEPS:
            _STEPS[name](self, arg)
        elif name not in _IGNORED:
            raise ValueError(f"the opcode {name} is none that torch writes")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def since_mark(self) -> list[Any]:
        """The values pushed since the last mark, which are gone from the stack."""
        items, self.stack = self.stack, self.marked.pop()
        return items

    def mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def tuple_of(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def extend(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("items are added to what is no list")
        target.extend(items)

    def set_items(self, items: Sequence[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key without a value")
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("items are set in what is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def named(self, name: str) -> None:
        if name not in self.known:
            raise _Forbidden(repr(name[:200]))
        self.stack.append(self.known[name])

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("a global without a name")
        self.named(f"{module}.{name}")

    def reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(arguments, tuple):
            raise ValueError("a call without arguments")
        self.stack.append(call(function, arguments))

    def build(self, _: Any) -> None:
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):  # an OrderedDict's attributes: `_metadata`, versions of modules
            raise Unreadable("its pickle sets attributes of what is no state dict")

    def persistent(self, _: Any) -> None:
        if self.stored is None:
            raise ValueError("a persistent id where none can be")
        self.stack.append(self.stored(self.stack.pop()))


def call(function: Any, arguments: Sequence[Any]) -> Any:
    """What calling a known global gives; raises ValueError for anything else."""
    if not isinstance(function, Known) or function.call is None:
        name = function.name if isinstance(function, Known) else f"a {type(function).__name__}"
        raise ValueError(f"a call of {name}, which is no function")
    return function.call(arguments)


def _key(key: Any) -> Any:
    """A key that is quick and safe to hash; any other is only ever itself."""
    plain = key is None or isinstance(key, (str, bool)) or (isinstance(key, int) and abs(key) < LARGEST_KEY)
    return key if plain else _Other()


class _Other:
    """A key that is no name."""


def _pairs(arguments: Sequence[Any]) -> dict[Any, Any]:
    """OrderedDict(), or OrderedDict of a list of pairs as Python 2 wrote it."""
    pairs = arguments[0] if arguments else ()
    if (
        len(arguments) > 1
        or not isinstance(pairs, (list, tuple))
        or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
    ):
        raise ValueError("an OrderedDict of what are no pairs")
    return {_key(key): value for key, value in pairs}


ORDERED_DICT = Known("collections.OrderedDict", _pairs)

_PLAIN = (
    "BININT BININT1 BININT2 LONG1 LONG4 BINFLOAT BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8"
    " BINUNICODE SHORT_BINUNICODE BINUNICODE8"
)
_PUSHED = frozenset(_PLAIN.split())
_CONSTANTS = MappingProxyType({"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()})
_IGNORED = frozenset(("PROTO", "FRAME", "STOP"))
_STEPS: Mapping[str, Callable[[_Machine, Any], Any]] = MappingProxyType(
    {
        "MARK": _Machine.mark,
        "POP": lambda machine, _: machine.stack.pop(),
        "POP_MARK": lambda machine, _: machine.since_mark(),
        "BINPUT": _Machine.put,
        "LONG_BINPUT": _Machine.put,
        "MEMOIZE": _Machine.memoize,
        "BINGET": _Machine.get,
        "LONG_BINGET": _Machine.get,
        "EMPTY_DICT": lambda machine, _: machine.push({}),
        "EMPTY_LIST": lambda machine, _: machine.push([]),
        "EMPTY_SET": lambda machine, _: machine.push([]),
        "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
        "FROZENSET": lambda machine, _: machine.push(tuple(machine.since_mark())),
        "TUPLE1": lambda machine, _: machine.tuple_of(1),
        "TUPLE2": lambda machine, _: machine.tuple_of(2),
        "TUPLE3": lambda machine, _: machine.tuple_of(3),
        "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
        "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
        "ADDITEMS": lambda machine, _: machine.extend(machine.since_mark()),
        "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
        "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
        "GLOBAL": lambda machine, arg: machine.named(".".join(arg.split(" ", 1))),
        "STACK_GLOBAL": _Machine.stack_global,
        "REDUCE": _Machine.reduce,
        "BUILD": _Machine.build,
        "BINPERSID": _Machine.persistent,
    }
)
