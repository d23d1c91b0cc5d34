"""Any sequence of writing, interrupting, damaging, losing and reopening: the store knows what a dict would, or less.

"Less" only where something was damaged or interrupted, and never other bytes.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kittybuild.digest import Digest
from kittybuild.store.gc import Policy
from kittybuild.store.pack import read_pack_header
from kittybuild.store.store import DamagedTensor, FinishedPack, PackWriter, Store
from kittybuild.tensors import DType
from tests.faults import Sample, UnsyncedDisk, fill, manifest_of, quick_folder, sample

UNIVERSE = {
    s.ref.digest: s
    for s in (
        *(sample(f"t{n}", DType.F32, (n + 1,)) for n in range(4)),
        sample("block", DType.BF16, (2048,)),
        sample("blocks", DType.U8, (3, 4096)),
        sample("empty", DType.F16, (2, 0)),
    )
}
SOME = st.lists(st.sampled_from(sorted(UNIVERSE)), min_size=1, max_size=5, unique=True).map(
    lambda digests: tuple(UNIVERSE[digest] for digest in digests)
)


class StoreMachine(RuleBasedStateMachine):
    """`packs` are those that must be there, whole; `spare` are tensors that unfinished files must still give."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.root = str(self.stack.enter_context(quick_folder()) / "store")
        self.packs: dict[Digest, tuple[Sample, ...]] = {}
        self.interrupted: list[tuple[Sample, ...]] = []
        self.spare: set[Digest] = set()
        self.manifests: dict[Digest, tuple[Sample, ...]] = {}

    @initialize()
    def open(self) -> None:
        self.store = Store.open(self.root, disk=UnsyncedDisk())

    def teardown(self) -> None:
        self.store.close()
        self.stack.close()

    def held(self) -> set[Digest]:
        return {s.ref.digest for pack in self.packs.values() for s in pack}

    def put(self, writer: PackWriter, samples: tuple[Sample, ...]) -> None:
        """As a build does: copy what is there, write what is not, and write anew what turns out to be damaged."""
        for s in samples:
            location = self.store.location(s.ref.digest)
            if location is None:
                fill(writer, [s])
                continue
            try:
                writer.copy(s.name, s.ref, location, s.key)
            except DamagedTensor as error:
                self.store.discard(error.path)
                fill(writer, [s])

    @rule(samples=SOME)
    def write(self, samples: tuple[Sample, ...]) -> None:
        with self.store.write_pack((s.name, s.spec) for s in samples) as writer:
            self.put(writer, samples)
            pack = writer.finish()
        self.packs[pack.digest] = samples
        digest = self.store.put_manifest(manifest_of(pack, samples))
        self.store.set_root("out", "/out", digest)
        self.manifests[digest] = samples

    @rule(samples=SOME, count=st.integers(0, 5))
    def interrupt(self, samples: tuple[Sample, ...], count: int) -> None:
        # What is gone on with in place and stops again is an interrupted pack once more: nothing is lost by it.
        with self.store.write_pack((s.name, s.spec) for s in samples) as writer:
            self.put(writer, samples[:count])
        self.interrupted.append(samples[:count])

    @rule()
    def salvage(self) -> None:
        self.store.salvage()
        self.spare |= {s.ref.digest for samples in self.interrupted for s in samples}
        self.interrupted.clear()

    @rule()
    def finish_build(self) -> None:
        self.store.drop_salvaged()
        self.spare.clear()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    @rule(corrupt=st.booleans())
    def lose_index(self, corrupt: bool) -> None:
        self.store.close()
        if corrupt:
            Path(self.root, "index/cache.db").write_bytes(b"no database" * 1000)
        else:
            shutil.rmtree(f"{self.root}/index")
        self.open()
        self.spare.clear()  # only salvaging finds them again

    @rule()
    def rebuild(self) -> None:
        self.store.rebuild_index()

    @rule(keep=st.booleans())
    def collect(self, keep: bool) -> None:
        """Only the last manifest has a root; whoever keeps by size may keep more."""
        self.store.collect(Policy(max_size=1 << 40) if keep else Policy())
        rooted = {root.manifest for root in self.store.roots()}
        needed = {digest for digest in self.packs if any(self.pack_of(root) == digest for root in rooted)}
        self.packs = {digest: samples for digest, samples in self.packs.items() if digest in needed}
        if not keep:
            for digest in set(self.manifests) - rooted:
                assert self.store.manifest(digest) is None
                del self.manifests[digest]
        assert self.held() <= set(self.store.locations(UNIVERSE))

    def pack_of(self, root: Digest) -> Digest | None:
        manifest = self.store.manifest(root)
        return manifest.shards[0].pack if manifest else None

    @rule()
    def check_finds_nothing_wrong(self) -> None:
        assert {damage.kind for damage in self.store.check().damage} <= {"pack", "file"}

    @rule()
    def another_process_reads(self) -> None:
        with Store.open(self.root, disk=UnsyncedDisk()) as other:
            assert self.held() <= set(other.locations(UNIVERSE))
            for digest in self.packs:
                assert other.pack(digest)

    @precondition(lambda self: self.packs)
    @rule(data=st.data())
    def set_aside_a_sound_pack(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.packs)))
        path = self.store.pack(digest)
        assert path
        self.store.discard(path)
        assert self.store.pack(digest) is None
        self.spare |= {s.ref.digest for s in self.packs.pop(digest)}

    @precondition(lambda self: self.packs)
    @rule(data=st.data())
    def damage_a_tensor(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.packs)))
        path = self.store.pack(digest)
        assert path
        layout, refs = read_pack_header(path)
        names = [name for name, ref in refs.items() if ref.spec.nbytes]
        if not names:
            return
        name = data.draw(st.sampled_from(names))
        os.chmod(path, 0o600)
        with open(path, "r+b") as file:
            file.seek(layout.offset(name))
            file.write(b"\xff")
        # Whoever reads it verifies, and discards it.
        location = self.store.location(refs[name].digest)
        if location is not None and location.path == path:
            with self.store.write_pack([("probe", refs[name].spec)]) as writer:
                with pytest.raises(DamagedTensor) as caught:
                    writer.copy("probe", refs[name], location)
                assert caught.value.path == path
        self.store.discard(path)
        self.spare |= {s.ref.digest for s in self.packs.pop(digest)} - {refs[name].digest}
        self.spare -= {refs[name].digest}

    @invariant()
    def what_must_be_there_is_there(self) -> None:
        locations = self.store.locations(UNIVERSE)
        assert self.held() | self.spare <= set(locations)
        for digest, location in locations.items():
            with open(location.path, "rb") as file:
                assert os.pread(file.fileno(), location.nbytes, location.offset) == UNIVERSE[digest].data
        for digest, samples in self.packs.items():
            path = self.store.pack(digest)
            assert path
            assert read_pack_header(path)[1] == {s.name: s.ref for s in samples}

    @invariant()
    def what_was_made_is_known(self) -> None:
        keys = {s.key: s.ref for samples in self.manifests.values() for s in samples}
        assert keys.items() <= self.store.realisations(s.key for s in UNIVERSE.values()).items()
        for digest, samples in self.manifests.items():
            manifest = self.store.manifest(digest)
            assert manifest is not None
            shard = manifest.shards[0]
            assert manifest == manifest_of(FinishedPack(shard.pack, "", shard.size), samples)
        assert {kept.manifest for kept in self.store.roots()} <= set(self.manifests)


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestStore = StoreMachine.TestCase
