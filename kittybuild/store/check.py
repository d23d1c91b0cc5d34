"""Checking a store: every byte that has a name is compared with it, what was not looked at for longest first.

Changes nothing but the note of when a pack was found good, taken pack by pack: after a check that was cut short the
next one begins with what that did not reach.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kittybuild.digest import Digest
from kittybuild.errors import StoreError
from kittybuild.store.inside import Inside
from kittybuild.store.layout import stored_digests
from kittybuild.store.packs import named_pack
from kittybuild.store.problems import damaged
from kittybuild.store.reading import digests, quick_digest, small_file
from kittybuild.store.reserve import SIZE, reserved
from kittybuild.store.roots import Root
from kittybuild.store.usage import Kept, needed_by

_CHECKED = "checked"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much to check. `full`: by BLAKE3, not by XXH3 where that is known; `sample`: this share of the bytes;
    `older_than`: only packs that were last checked so many seconds before `now`."""

    full: bool = False
    sample: float = 1.0
    older_than: float = 0.0
    now: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not what it must be, and the outputs that need it."""

    kind: str
    path: str
    what: str
    digest: Digest | None = None
    hurt: tuple[Root, ...] = ()

    def error(self) -> StoreError:
        """As an error."""
        hurt = "".join(f"\n  needed by {root.name} in {root.folder}" for root in self.hurt)
        return damaged(self.path, f"{self.what}{hurt}", "run `kittybuild store repair`")


@dataclass(frozen=True)
class Checked:
    """How many packs were read and how many left out, bytes of packs that were read, and what is damaged."""

    packs: int
    left: int
    bytes: int
    damage: tuple[Damage, ...]


def check(inside: Inside, extent: Extent) -> Checked:
    """Compare what is in the store with its names."""
    needed = needed_by(inside)
    damage = [*_reserve(inside), *_index(inside), *_roots(inside), *_small(inside, needed), *_gone(inside, needed)]
    chosen, left = _choose(inside, extent)
    size = 0
    for digest, path in chosen:
        size += _size(path)
        if what := pack_damage(inside, digest, path, full=extent.full):
            damage.append(Damage("pack", path, what, digest, needed.packs.get(digest, ())))
        else:
            _note(inside, digest, extent)
    return Checked(len(chosen), left, size, tuple(damage))


def pack_damage(inside: Inside, digest: Digest, path: str, *, full: bool) -> str | None:
    """What is wrong with a pack; None if it is sound, or not there any more."""
    try:
        layout, refs = named_pack(path, digest)
        checksums = {} if full else inside.facts.checksums(ref.digest for ref in refs.values())
        with open(path, "rb") as file:
            for name, ref in refs.items():
                place = file.fileno(), layout.offset(name), ref.spec.nbytes
                quick = checksums.get(ref.digest)
                sound = quick_digest(*place) == quick if quick else digests(*place)[0] == ref.digest
                if not sound:
                    return f"the bytes of {name} are not tensor {ref.digest}"
    except FileNotFoundError:
        return None
    except StoreError as error:
        return error.message.removeprefix("damaged: ")
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def _choose(inside: Inside, extent: Extent) -> tuple[list[tuple[Digest, str]], int]:
    """The packs to read, the longest unchecked first, and how many are left out."""
    packs = stored_digests(inside.paths.packs, ".safetensors")
    known = {digest: _last(inside, digest, full=extent.full) for digest, _ in packs}
    due = [pack for pack in packs if known[pack[0]] <= extent.now - extent.older_than]
    due.sort(key=lambda pack: (known[pack[0]], pack[0]))
    wanted, chosen = extent.sample * sum(_size(path) for _, path in packs), []
    for pack in due:
        if wanted <= 0:
            break
        chosen.append(pack)
        wanted -= _size(pack[1])
    return chosen, len(packs) - len(chosen)


def _last(inside: Inside, digest: Digest, *, full: bool) -> float:
    """When a pack was last found good, in seconds since the epoch."""
    match inside.index.get(_CHECKED, digest.hex):
        case [int(quick), int(thorough)]:
            return float(thorough if full else max(quick, thorough))
    return 0.0


def _note(inside: Inside, digest: Digest, extent: Extent) -> None:
    now = int(extent.now)
    thorough = now if extent.full else int(_last(inside, digest, full=True))
    inside.index.put_many(_CHECKED, {digest.hex: [now, thorough]})


def _reserve(inside: Inside) -> Iterator[Damage]:
    """It may be away: then the disk was full."""
    if reserved(inside.paths) not in (None, SIZE):
        yield Damage("reserve", inside.paths.reserve, "not the size of a reserve: a full disk could not be cleaned")


def _index(inside: Inside) -> Iterator[Damage]:
    if what := inside.index.damage():
        yield Damage("index", inside.paths.index, what)
    elif rows := inside.index.damaged_rows():
        yield Damage("rows", inside.paths.index, f"{rows} rows of the index are not as they were written")


def _roots(inside: Inside) -> Iterator[Damage]:
    for path in inside.roots.files():
        try:
            inside.roots.read(path)
        except StoreError:
            yield Damage("root", path, "not a root: what its output needs is not kept any more")
        except FileNotFoundError:
            continue


def _small(inside: Inside, needed: Kept) -> Iterator[Damage]:
    kinds: tuple[tuple[str, str, str, Mapping[Digest, tuple[Root, ...]]], ...] = (
        ("manifest", inside.paths.manifests, ".json", needed.manifests),
        ("file", inside.paths.files, "", needed.files),
    )
    for kind, folder, suffix, needs in kinds:
        for digest, path in stored_digests(folder, suffix):
            try:
                data = small_file(path)
            except OSError as error:
                yield Damage(kind, path, f"cannot be read: {error.strerror or error}", digest, needs.get(digest, ()))
                continue
            if data is not None and Digest.of(data) != digest:
                yield Damage(kind, path, "other bytes than its name says", digest, needs.get(digest, ()))


def _gone(inside: Inside, needed: Kept) -> Iterator[Damage]:
    """What outputs need and is not there. What a root has beside its manifest only saves time."""
    for digest, roots in needed.packs.items():
        if not os.path.exists(inside.paths.pack(digest)):
            yield Damage("pack", inside.paths.pack(digest), "a pack that is gone", digest, roots)
    also = {digest for roots in needed.manifests.values() for root in roots for digest in root.also}
    for kind, place, needs in (
        ("manifest", inside.paths.manifest, needed.manifests),
        ("file", inside.paths.file, needed.files),
    ):
        for digest, roots in needs.items():
            if digest not in also and not os.path.exists(place(digest)):
                yield Damage(kind, place(digest), f"a {kind} that is gone", digest, roots)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0
