"""Checks of one source: layers, lazy torch, no hidden state, one edge, sizes, docstrings. They see its text alone.

Imports inside functions count. `tests/unit/test_layers.py` runs them over the package, and on sources that break them.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "kittybuild"

# Lowest first. A part imports only parts of lower layers; parts of one layer do not import each other.
LAYERS = (
    "errors",
    "digest",
    "tensors",
    "model",
    "recipe checkpoint tokens builders store",
    "planner",
    "executor",
    "publish",
    "search report",
    "api",
    "reproduce",
    "calls",
    "opened",
    "compat",
    "cli testing",
)
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer.split()}

# Importing one of these imports torch. Some parts may, and of those only two when they are imported themselves.
HEAVY = ("torch", "transformers", "peft", "accelerate", "safetensors.torch")
MAY_IMPORT_HEAVY = ("builders", "executor", "checkpoint")
MAY_IMPORT_HEAVY_AT_TOP = ("builders", "executor")

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60

DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


MUTABLE_TYPES = words(
    "list dict set bytearray defaultdict OrderedDict Counter ChainMap deque SimpleNamespace WeakSet WeakKeyDictionary"
    " WeakValueDictionary dict.fromkeys itertools.count threading.local"
)
IMMUTABLE_TYPES = words("Mapping Sequence Collection Container Iterable AbstractSet FrozenSet frozenset tuple")

EXIT_NAMES = words("builtins.SystemExit sys.exit")
EDGE_NAMES = EXIT_NAMES | words(
    "builtins.print builtins.input builtins.exit builtins.quit sys.argv sys.stdin sys.stdout sys.stderr"
    " os._exit os.environ os.environb os.getenv os.putenv os.unsetenv"
)

SEEDED_GENERATORS = words(
    "random.Random numpy.random.Generator numpy.random.BitGenerator numpy.random.SeedSequence numpy.random.Philox"
    " numpy.random.PCG64 numpy.random.default_rng"
)
TORCH_STATE = words("manual_seed manual_seed_all seed seed_all initial_seed get_rng_state set_rng_state")
TORCH_SAMPLERS = words(
    "rand randn randint randperm normal bernoulli multinomial poisson rand_like randn_like randint_like"
)
TORCH_SAMPLING_METHODS = words("bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_")

Finding = tuple[int, str]  # line, what is wrong


@dataclass(frozen=True)
class Source:
    """One file of the package: its path from the root of the repository, and its text."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def names(self) -> tuple[str, ...]:
        """The dotted name of the module, in pieces: ("kittybuild", "store", "packs")."""
        names = Path(self.path).with_suffix("").parts
        return names[:-1] if names[-1] == "__init__" else names

    @property
    def part(self) -> str:
        """The part that the file belongs to; "" for the package's own `__init__`."""
        return self.names[1] if len(self.names) > 1 else ""

    def absolute(self, level: int, name: str) -> str:
        """What `name`, with `level` dots before it, names when it is imported here."""
        if level == 0:
            return name
        package = self.names if self.path.endswith("/__init__.py") else self.names[:-1]
        return ".".join((*package[: len(package) - level + 1], *([name] if name else [])))


@dataclass(frozen=True)
class Import:
    """One imported name, and when that happens: `top` on import, `inside` on a call, `typing` never."""

    target: str
    line: int
    when: str

    @property
    def part(self) -> str | None:
        """The part of the package that it uses; the root's public names come from api."""
        first, _, rest = self.target.partition(".")
        name = rest.partition(".")[0]
        if first != PACKAGE or name == "__version__":
            return None
        return name if name in RANK else "api"

    @property
    def heavy(self) -> bool:
        return any(self.target == name or self.target.startswith(f"{name}.") for name in HEAVY)


# ---- reading a source


def located(nodes: Iterable[ast.AST], when: str = "top") -> Iterator[tuple[ast.AST, str]]:
    """Every node below, with when it runs."""
    for node in nodes:
        yield node, when
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from located(node.body, "typing")
            yield from located(node.orelse, when)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from located(ast.iter_child_nodes(node), "inside")
        else:
            yield from located(ast.iter_child_nodes(node), when)


def imports(source: Source) -> Iterator[Import]:
    """All imports, also those by `import_module` as far as their text says what they import."""
    for node, when in located(source.tree.body):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = source.absolute(node.level, node.module or "")
            yield from (Import(f"{base}.{alias.name}", node.lineno, when) for alias in node.names)
        elif isinstance(node, ast.Call) and (text := dynamic_import(node)):
            name = text.lstrip(".")
            yield Import(source.absolute(len(text) - len(name), name.rstrip(".")), node.lineno, when)


def dynamic_import(call: ast.Call) -> str:
    """The module that a call imports, or what its name begins with; "" if it imports none or does not say."""
    if not call.args or ast.unparse(call.func).rpartition(".")[2] not in ("import_module", "__import__"):
        return ""
    return leading_text(call.args[0])


def leading_text(node: ast.expr) -> str:
    """The text of a string, or what an f-string begins with; "" if that is not known."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def aliases(source: Source) -> dict[str, str]:
    """What the names that the file imports stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or name] = name
        elif isinstance(node, ast.ImportFrom):
            base = source.absolute(node.level, node.module or "")
            found.update({alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names})
    return found


def uses(source: Source) -> Iterator[tuple[str, ast.expr, ast.Call | None]]:
    """Every name that is read, in full (`np.random.seed` is `numpy.random.seed`), and its call if it is called."""
    known = aliases(source)
    calls = {id(node.func): node for node in ast.walk(source.tree) if isinstance(node, ast.Call)}

    def full(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return known.get(node.id, f"builtins.{node.id}") if isinstance(node, ast.Name) else "?"

    for node in ast.walk(source.tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            yield full(node), node, calls.get(id(node))


def module_statements(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The statements that run on import, also those under if, try, with and for; not those of classes."""
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node
            yield from module_statements(n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.expr))


# ---- the checks: each yields what is wrong with one source


def layers(source: Source) -> Iterator[Finding]:
    """Imports between parts point downwards only."""
    if source.part not in (*RANK, "", "__main__"):
        yield 1, f"{source.part} is no part of the package: see LAYERS in tests/structure.py"
        return
    for used in imports(source):
        if used.part is None or source.part in (used.part, "__main__"):
            continue
        if source.part == "":
            if used.when == "top":
                yield used.line, f"the package imports {used.part} before it is asked for: do it in __getattr__"
        elif RANK[used.part] >= RANK[source.part]:
            yield used.line, f"{source.part} may not import {used.part} ({used.target}): it is not in a lower layer"


def heavy_imports(source: Source) -> Iterator[Finding]:
    """What is large to import is imported in few parts, and late."""
    for used in imports(source):
        if not used.heavy:
            continue
        if source.part not in MAY_IMPORT_HEAVY:
            yield used.line, f"only {', '.join(MAY_IMPORT_HEAVY)} may import {used.target}"
        elif used.when == "top" and source.part not in MAY_IMPORT_HEAVY_AT_TOP:
            yield used.line, f"{used.target} may be imported at the top only in {', '.join(MAY_IMPORT_HEAVY_AT_TOP)}"


def state(source: Source) -> Iterator[Finding]:
    """No mutable state at module level: nothing mutable is bound there, and nothing is bound there later."""
    for node in module_statements(source.tree.body):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or value is None:
            continue
        named_all = all(isinstance(target, ast.Name) and target.id == "__all__" for target in targets)
        constant = isinstance(node, ast.AnnAssign) and is_final_and_immutable(node.annotation)
        if mutable(value) and not named_all and not constant:
            names = ", ".join(ast.unparse(target) for target in targets if target)
            yield node.lineno, f"{names} is mutable: use a tuple, a frozenset, MappingProxyType or Final[Mapping[...]]"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield node.lineno, f"global {', '.join(node.names)}: state belongs into an object that is passed"


def mutable(value: ast.expr) -> bool:
    """Is this, or an element of this tuple or a branch of this expression, something that can be changed?"""
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func)
        return name in MUTABLE_TYPES or name.rpartition(".")[2] in MUTABLE_TYPES
    if isinstance(value, ast.BinOp) and isinstance(value.right, (ast.Set, ast.SetComp)):
        return mutable(value.left)  # frozenset | set is a frozenset
    if isinstance(value, (ast.Tuple, ast.BoolOp, ast.IfExp, ast.BinOp, ast.NamedExpr, ast.Starred)):
        return any(mutable(node) for node in ast.iter_child_nodes(value) if isinstance(node, ast.expr))
    return isinstance(value, DISPLAYS)


def is_final_and_immutable(annotation: ast.expr) -> bool:
    """Is this `Final[T]` with a T that has no way to be changed?"""
    if not isinstance(annotation, ast.Subscript) or ast.unparse(annotation.value).rpartition(".")[2] != "Final":
        return False
    inner = annotation.slice.value if isinstance(annotation.slice, ast.Subscript) else annotation.slice
    return ast.unparse(inner).rpartition(".")[2] in IMMUTABLE_TYPES


def randomness(source: Source) -> Iterator[Finding]:
    """No global random generator, of Python, numpy or torch; and none that nobody seeded."""
    way_out = "draw from a generator that is keyed and passed (numpy.random.Philox)"
    for name, node, call in uses(source):
        if is_global_random(name, call):
            yield node.lineno, f"{name} uses a global or unseeded random generator: {way_out}"
    top = {id(node) for node, when in located(source.tree.body) if when == "top"}
    for name, node, call in uses(source):
        if call and id(call) in top and name in (*SEEDED_GENERATORS, "torch.Generator"):
            yield node.lineno, f"{name} at module level is a global random generator: {way_out}"


def is_global_random(name: str, call: ast.Call | None) -> bool:
    """Does this name, called so, draw from, or set, a generator that nobody passed?"""
    head, _, last = name.rpartition(".")
    given = call is not None and any(keyword.arg == "generator" for keyword in call.keywords)
    if head in ("random", "numpy.random"):
        unseeded = call is not None and not call.args and not call.keywords
        return name != "random.SystemRandom" and (name not in SEEDED_GENERATORS or unseeded)
    if head == "torch" or head.startswith("torch."):
        return last in TORCH_STATE or (head == "torch" and last in TORCH_SAMPLERS and not given)
    return name == "transformers.set_seed" or (call is not None and last in TORCH_SAMPLING_METHODS and not given)


def edge(source: Source) -> Iterator[Finding]:
    """Only cli prints, exits, or reads the environment; `__main__` may exit, with what cli returns.

    The program of the worker processes is a process of its own: it reads its arguments and exits.
    """
    if source.part == "cli" or source.path == f"{PACKAGE}/executor/serve.py":
        return
    forbidden = EDGE_NAMES - EXIT_NAMES if source.part == "__main__" else EDGE_NAMES
    for name, node, _ in uses(source):
        if name in forbidden:
            yield node.lineno, f"only {PACKAGE}/cli/ may use {name.removeprefix('builtins.')}"
    for used in imports(source):
        if used.target.partition(".")[0] in ("click", "rich"):
            yield used.line, f"only {PACKAGE}/cli/ may import {used.target}"


def file_size(source: Source) -> Iterator[Finding]:
    """A file has one idea, and 500 lines at most."""
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield lines, f"{lines} lines; at most {MAX_FILE_LINES}"


def function_size(source: Source) -> Iterator[Finding]:
    """A function can be seen at once: 60 lines at most."""
    for node in ast.walk(source.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {lines} lines; at most {MAX_FUNCTION_LINES}"


def docstring(source: Source) -> Iterator[Finding]:
    """Every module says what it is, and what always holds there."""
    if not (ast.get_docstring(source.tree) or "").strip():
        yield 1, "the module has no docstring"


Check = Callable[[Source], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (layers, heavy_imports, state, randomness, edge, file_size, function_size, docstring)


def report(check: Check, source: Source) -> str:
    """What `check` finds in a source, a line each; "" if it is sound."""
    return "\n".join(f"{source.path}:{line}: {problem}" for line, problem in check(source))
