"""What the index knows, in the words of the model: realisations, locations, memos, shortcuts.

A fact that cannot be read counts as absent. A location names its file relative to the store, which may be moved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from kittybuild.digest import Digest, Json
from kittybuild.store.index import Index
from kittybuild.store.layout import Layout
from kittybuild.store.problems import not_deterministic
from kittybuild.tensors import TensorRef

_REALISATION = "realisation"
_LOCATION = "location"
_MEMO = "memo"
_SHORTCUT = "shortcut"
_NONFINITE = "nonfinite"
_COST = "cost"


@dataclass(frozen=True, slots=True)
class Location:
    """Where the bytes of a tensor lie. `path` is absolute; `xxh3` is their XXH3-64 in hex, None if it is not known."""

    path: str
    offset: int
    nbytes: int
    xxh3: str | None


class Facts:
    """The typed view of the index. `touched`: the files in which tensors were found."""

    def __init__(self, index: Index, layout: Layout) -> None:
        self._index = index
        self._layout = layout
        self.touched: set[str] = set()
        self._expected: tuple[Mapping[Digest, TensorRef], Mapping[Digest, Location]] = {}, {}

    def expect(self, made: Mapping[Digest, TensorRef], places: Mapping[Digest, Location]) -> None:
        """Tell these, too, from now on, where nothing else is known; they are not recorded."""
        self._expected = made, places

    def realisations(self, keys: Iterable[Digest]) -> dict[Digest, TensorRef]:
        """The tensors that derivations are known to make; only the known ones."""
        keys = tuple(keys)
        found = self._index.get_many(_REALISATION, (key.hex for key in keys))
        known = {Digest(key): ref for key, value in found.items() if (ref := _ref(value)) is not None}
        return {key: self._expected[0][key] for key in keys if key in self._expected[0]} | known

    def realise(self, facts: Mapping[Digest, TensorRef]) -> None:
        """Record what derivations made. What was known stays; raises StoreError if it differs."""
        for key, first in self.add_realisations(facts).items():
            raise not_deterministic(self._layout.root, key, first, facts[key])

    def add_realisations(self, facts: Mapping[Digest, TensorRef]) -> dict[Digest, TensorRef]:
        """Record what derivations made; the answer is what was known and differs."""
        rows = {key.hex: ref.to_json() for key, ref in sorted(facts.items(), key=lambda fact: fact[0])}
        known = self._index.add_many(_REALISATION, rows)
        return {Digest(key): ref for key, value in known.items() if (ref := _ref(value)) is not None}

    def locations(self, digests: Iterable[Digest]) -> dict[Digest, Location]:
        """Where tensors lie; only those whose file is there and long enough."""
        digests = tuple(digests)
        found = self._index.get_many(_LOCATION, (digest.hex for digest in digests))
        sizes: dict[str, int] = {}
        alive = {}
        for digest, value in found.items():
            location = self._location(value)
            if location is None:
                continue
            if location.path not in sizes:
                sizes[location.path] = _size(location.path)
            if location.offset + location.nbytes <= sizes[location.path]:
                alive[Digest(digest)] = location
        self.touched.update(location.path for location in alive.values())
        return {digest: self._expected[1][digest] for digest in digests if digest in self._expected[1]} | alive

    def set_locations(self, facts: Mapping[Digest, Location]) -> None:
        """Record where tensors lie, in place of what was known."""
        rows: dict[str, Json] = {
            digest.hex: [os.path.relpath(at.path, self._layout.root), at.offset, at.nbytes, at.xxh3]
            for digest, at in facts.items()
        }
        self._index.put_many(_LOCATION, rows)

    def located_in(self, path: str) -> dict[Digest, Location]:
        """All locations that point into one file, whether it is there or not."""
        rows = ((Digest(digest), self._location(value)) for digest, value in self._index.iterate(_LOCATION))
        return {digest: at for digest, at in rows if at is not None and at.path == path}

    def located_in_any(self, paths: Collection[str]) -> set[Digest]:
        """The tensors whose location is in one of these files."""
        rows = ((Digest(digest), self._location(value)) for digest, value in self._index.iterate(_LOCATION))
        return {digest for digest, at in rows if at is not None and at.path in paths}

    def checksums(self, digests: Iterable[Digest]) -> dict[Digest, str]:
        """The XXH3-64 of tensors where that is known, wherever they lie or lay."""
        found = self._index.get_many(_LOCATION, (digest.hex for digest in digests))
        places = ((digest, self._location(value)) for digest, value in found.items())
        return {Digest(digest): at.xxh3 for digest, at in places if at is not None and at.xxh3 is not None}

    def costs(self, digests: Iterable[Digest]) -> dict[Digest, float]:
        """How many seconds it took to make tensors; only the known ones."""
        found = self._index.get_many(_COST, (digest.hex for digest in digests))
        return {Digest(digest): value / 1e6 for digest, value in found.items() if isinstance(value, int)}

    def set_costs(self, facts: Mapping[Digest, float]) -> None:
        """Record how many seconds it took to make tensors."""
        self._index.put_many(_COST, {digest.hex: round(seconds * 1e6) for digest, seconds in facts.items()})

    def forget_located_in(self, paths: Collection[str]) -> None:
        """Forget the locations in some files; not those that another process has just set to a better place."""
        with self._index.together():
            self.forget_locations(self.located_in_any(paths))

    def forget_locations(self, digests: Iterable[Digest]) -> None:
        """Forget where tensors lie."""
        self._index.delete(_LOCATION, [digest.hex for digest in digests])

    def memos(self, file_key: Digest) -> dict[str, Digest]:
        """What is known of the tensors in one source file: name -> digest."""
        rows = self._index.iterate(_MEMO, f"{file_key.hex}/")
        return {json.loads(key.partition("/")[2]): Digest(str(value)) for key, value in rows}

    def some_memos(self, wanted: Iterable[tuple[Digest, str]]) -> dict[tuple[Digest, str], Digest]:
        """What is known of some tensors, by source file and name."""
        keys = {f"{file.hex}/{json.dumps(name)}": (file, name) for file, name in wanted}
        return {keys[key]: Digest(str(value)) for key, value in self._index.get_many(_MEMO, keys).items()}

    def announce(self, places: Mapping[Digest, Location], memos: Mapping[tuple[Digest, str], Digest]) -> None:
        """Record at once where new tensors lie, and what was learned of the sources that they were made of."""
        with self._index.together():
            known = self.locations(places)
            self.set_locations({digest: place for digest, place in places.items() if digest not in known})
            rows = {f"{file.hex}/{json.dumps(name)}": digest.hex for (file, name), digest in memos.items()}
            self._index.put_many(_MEMO, rows)

    def remember(self, file_key: Digest, facts: Mapping[str, Digest]) -> None:
        """Add to what is known of one source file."""
        # A row for each tensor, so that a build may add them one by one; the name as JSON, so that any name is a key.
        rows = {f"{file_key.hex}/{json.dumps(name)}": digest.hex for name, digest in facts.items()}
        self._index.put_many(_MEMO, rows)

    def shortcut(self, key: Digest) -> Digest | None:
        """The manifest that a whole stage is known to give."""
        value = self._index.get(_SHORTCUT, key.hex)
        return Digest(value) if isinstance(value, str) else None

    def set_shortcut(self, key: Digest, manifest: Digest) -> None:
        """Record the manifest of a whole stage."""
        self._index.put_many(_SHORTCUT, {key.hex: manifest.hex})

    def nonfinite(self, digests: Iterable[Digest]) -> dict[Digest, int]:
        """How many elements of tensors are known to be NaN or infinite; only those that have some."""
        found = self._index.get_many(_NONFINITE, (digest.hex for digest in digests))
        return {Digest(digest): count for digest, count in found.items() if isinstance(count, int)}

    def set_nonfinite(self, facts: Mapping[Digest, int]) -> None:
        """Record how many elements of tensors are NaN or infinite."""
        self._index.put_many(_NONFINITE, {digest.hex: count for digest, count in facts.items()})

    def counts(self) -> tuple[int, int]:
        """How many realisations and how many locations."""
        return self._index.count(_REALISATION), self._index.count(_LOCATION)

    def _location(self, value: Json) -> Location | None:
        match value:
            case [str(place), int(offset), int(nbytes), str() | None as xxh3]:
                path = os.path.normpath(os.path.join(self._layout.root, place))
                if path.startswith((self._layout.packs + os.sep, self._layout.tmp + os.sep)):
                    return Location(path, offset, nbytes, xxh3)
        return None


def _ref(value: Json) -> TensorRef | None:
    try:
        return TensorRef.from_json(value)
    except ValueError:
        return None


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1
