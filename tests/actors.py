"""Who acts on a store as he is told: in this process, or in one of his own that can die half-way."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from kittybuild import api
from kittybuild.errors import StoreError
from kittybuild.store.disk import Disk
from kittybuild.store.gc import Policy
from kittybuild.store.store import DamagedTensor, Store
from kittybuild.tensors import DType
from tests.building import started
from tests.faults import Fault, FaultyDisk, Sample, UnsyncedDisk, fill, manifest_of, sample

SAMPLES = {
    s.name: s
    for s in (
        *(sample(f"t{n}", DType.F32, (n + 1,)) for n in range(3)),
        sample("block", DType.BF16, (2048,)),
        sample("blocks", DType.U8, (3, 4096)),
        sample("empty", DType.F16, (2, 0)),
    )
}
DIED = "died"


class Actor:
    """Acts on one store, and keeps it open until told to let go. Recipes: a folder with one for each weight."""

    def __init__(self, root: str, recipes: str) -> None:
        self.root, self.recipes = root, recipes
        self.store: Store | None = None

    def act(self, name: str, *args: Any) -> Any:
        """Do as told; the code of an error of the store is an answer, too."""
        try:
            return getattr(self, name)(*args)
        except StoreError as error:
            return error.code

    def let_go(self) -> None:
        """Close the store."""
        if self.store is not None:
            self.store.close()
            self.store = None

    def put(self, names: Iterable[str], folder: str) -> None:
        """Write samples as the output of a folder, as a build does: what is there is copied."""
        put(self._opened(), [SAMPLES[name] for name in names], folder)

    def get(self, names: Iterable[str]) -> list[bytes | None]:
        """The bytes of samples, verified, None where they are not there."""
        return [_read(self._opened(), SAMPLES[name]) for name in names]

    def build(self, weight: float) -> int:
        """Build the recipe with that weight; how many tensors were computed."""
        prepared = api.prepare(api.read_recipe(f"{self.recipes}/{weight}.yml"), folder=f"{self.root}/../out")
        return api.build(prepared, self._opened(), processes=False).stages["soup"].computed

    def gc(self, keep: bool) -> None:
        """Collect what no root keeps; `keep`: only what is of no use to anybody."""
        self._opened().collect(Policy(max_size=1 << 40) if keep else Policy(), patience=0.0)

    def damage(self) -> list[str]:
        """The paths of what a check finds."""
        return [damage.path for damage in self._opened().check().damage]

    def repair(self) -> None:
        """Set aside what is damaged and put together what can be."""
        self._opened().repair()

    def roots(self) -> dict[str, str]:
        """The manifests of outputs by folder."""
        return {root.folder: root.manifest.hex for root in self._opened().roots()}

    def end(self, n: int, name: str, *args: Any) -> Any:
        """Do as told on a store opened anew, until the n-th file operation, which ends the process."""
        self.let_go()
        self._opened(FaultyDisk(n, Fault.EXIT))
        answer = self.act(name, *args)
        self.let_go()
        return answer

    def _opened(self, disk: Disk | None = None) -> Store:
        if self.store is None:
            self.store = Store.open(self.root, disk=disk or UnsyncedDisk())
        return self.store


class Other:
    """An actor in a process of its own; in a new one when it died."""

    def __init__(self, root: str, recipes: str) -> None:
        self.args = root, recipes
        self._start()

    def _start(self) -> None:
        self._end, theirs = Pipe()
        self._process = started(_serve, theirs, *self.args)
        theirs.close()

    def act(self, name: str, *args: Any) -> Any:
        """As Actor does, or DIED."""
        self._end.send((name, args))
        try:
            told, answer = self._end.recv()
        except EOFError:
            self._process.join()
            assert self._process.exitcode == 9
            self._start()
            return DIED
        assert told == "done", answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._end.close()
        self._process.join()


def _serve(orders: Connection, root: str, recipes: str) -> None:
    """Do as told until nobody tells anything any more."""
    actor = Actor(root, recipes)
    while True:
        try:
            name, args = orders.recv()
        except EOFError:
            os._exit(0)
        try:
            orders.send(("done", actor.act(name, *args)))
        except Exception:
            orders.send(("failed", traceback.format_exc()))


def put(store: Store, samples: list[Sample], folder: str) -> None:
    """A whole build, of samples."""
    store.salvage()
    with store.write_pack((s.name, s.spec) for s in samples) as writer:
        for s in samples:
            while (location := store.location(s.ref.digest)) is not None:
                try:
                    writer.copy(s.name, s.ref, location, s.key)
                    break
                except DamagedTensor as error:
                    store.discard(error.path)
            else:
                fill(writer, [s])
        pack = writer.finish()
    store.put_file(b'{"model_type": "pico"}')
    store.set_root("put", folder, store.put_manifest(manifest_of(pack, samples)))
    store.drop_salvaged()


def _read(store: Store, s: Sample) -> bytes | None:
    with store.write_pack([(s.name, s.spec)]) as writer:
        try:
            while (location := store.location(s.ref.digest)) is not None:
                try:
                    writer.copy(s.name, s.ref, location)
                except DamagedTensor as error:
                    store.discard(error.path)
                    continue
                path, offset = writer.place(s.name)
                with open(path, "rb") as file:
                    return os.pread(file.fileno(), s.spec.nbytes, offset)
            return None
        finally:
            writer.discard()
