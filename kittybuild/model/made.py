"""What is told of a derivation after a build, and how two such tellings differ. kittybuild.json holds them.

An input is told by content; what is not known (yet) is None, and equals nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kittybuild.digest import Json


@dataclass(frozen=True, slots=True)
class Made:
    """What made a tensor. `inputs`: each as (source or stage, name, digest in hex)."""

    builder: str
    version: int | str
    numerics: str
    key: str | None
    inputs: tuple[tuple[str, str, str | None], ...]

    def to_json(self) -> Json:
        """`[builder, version, numerics, key, inputs]`."""
        return [self.builder, self.version, self.numerics, self.key, [list(given) for given in self.inputs]]

    @classmethod
    def from_json(cls, value: Any) -> Made:
        """The inverse of `to_json`; raises ValueError for anything else."""
        match value:
            case [str(builder), int() | str() as version, str(numerics), str() | None as key, [*inputs]]:
                return cls(builder, version, numerics, key, tuple(map(_input, inputs)))
        raise ValueError(f"not what made a tensor: {value!r:.80}")


def _input(value: Any) -> tuple[str, str, str | None]:
    match value:
        case [str(of), str(name), str() | None as digest]:
            return of, name, digest
    raise ValueError(f"not an input: {value!r:.80}")


Derivations = Mapping[str, Mapping[str, Made]]
"""What made the tensors of a build, by stage and name."""


def read_derivations(value: Any) -> Derivations:
    """The `derivations` of a kittybuild.json; raises ValueError."""
    if not isinstance(value, dict) or not all(isinstance(made, dict) for made in value.values()):
        raise ValueError("its derivations are not by stage and tensor")
    return {stage: {name: Made.from_json(one) for name, one in made.items()} for stage, made in value.items()}


@dataclass(frozen=True, slots=True)
class Apart:
    """How two tellings of one tensor differ. `fields`: (what, was, now). `contents`: inputs that hold other bytes, by
    source or stage and name. `others`: it is made of other tensors. `params`: its key differs, and nothing else."""

    fields: tuple[tuple[str, str, str], ...]
    contents: tuple[tuple[str, str], ...]
    others: bool

    @property
    def params(self) -> bool:
        """See the class."""
        return not (self.fields or self.contents or self.others)


def apart(before: Made, after: Made) -> Apart | None:
    """How `after` differs from `before`; None where they have one key."""
    if before.key is not None and before.key == after.key:
        return None
    pairs = (("builder", before.builder, after.builder), ("numerics", before.numerics, after.numerics))
    fields = [(what, was, now) for what, was, now in pairs if was != now]
    if before.builder == after.builder and before.version != after.version:
        fields.append((f"version of {after.builder}", str(before.version), str(after.version)))
    others = [given[:2] for given in before.inputs] != [given[:2] for given in after.inputs]
    known = {given[:2]: given[2] for given in before.inputs}
    contents = [
        given[:2] for given in after.inputs if given[:2] in known and (given[2] is None or known[given[:2]] != given[2])
    ]
    return Apart(tuple(fields), tuple(dict.fromkeys(contents)), others)


def first_cause(before: Derivations, after: Derivations, stages: tuple[str, str], tensor: str) -> str | None:
    """Why a tensor of one build is another in a second one, as deep as their tellings lead; None where both have it by
    the same key. `stages`: where it is, in each. Tellings may be a stranger's, and lead in a circle."""
    seen: set[tuple[str, str]] = set()
    while True:
        was, now = before.get(stages[0], {}).get(tensor), after.get(stages[1], {}).get(tensor)
        if was is None or now is None:
            return f"{tensor} is made otherwise now"
        difference = apart(was, now)
        if difference is None:
            return None
        if difference.fields:
            what, old, new = difference.fields[0]
            return f"{tensor}: the {what} was {old}, now it is {new}"
        if difference.others:
            return f"{tensor} is made of other tensors now"
        made = [(of, name) for of, name in difference.contents if of in before and of in after]
        for of, name in difference.contents:
            if of not in before and of not in after:
                return f"the source {of} holds another {name} than the one that was merged"
        if not made or made[0] in seen:
            return f"{tensor}: its parameters are others"
        seen.add(made[0])
        (of, tensor), *_ = made
        stages = of, of
