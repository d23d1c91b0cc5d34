"""What every store of blobs and of realisations must do: our own on the disk, and a cache in every kind of bucket."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from kittybuild.digest import Digest
from kittybuild.store.remote.bucket import Bucket
from kittybuild.store.remote.cache import GROUPED, RAW, Cache
from kittybuild.store.remote.claims import Output, outputs_claim
from kittybuild.store.remote.keys import SigningKey
from kittybuild.store.remote.names import TRACES
from kittybuild.store.remote.substituters import Substituters, Trust
from kittybuild.store.store import Store
from kittybuild.tensors import DType, TensorRef, TensorSpec
from kittybuild.testing.contracts import BLOBS, REALISATIONS, BrokenContract, check_blobs, check_realisations

KEYS = (SigningKey.new("one-1"), SigningKey.new("two-1"))


def fails(note: str) -> None:
    """No note is expected: nothing here is wrong."""
    raise AssertionError(note)


@dataclass(frozen=True)
class Packs:
    """Blobs as tensors of bytes, each in a pack of its own."""

    store: Store

    def put(self, data: bytes) -> Digest:
        ref = TensorRef(Digest.of(data), TensorSpec(DType.U8, (len(data),)))
        with self.store.write_pack([("x", ref.spec)]) as writer:
            writer.write("x", 0, data)
            writer.done("x", ref, None, None)
            writer.finish()
        return ref.digest

    def get(self, digest: Digest, nbytes: int) -> bytes | None:
        place = self.store.location(digest)
        if place is None or place.nbytes != nbytes:
            return None
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            data = file.read(nbytes)
        assert Digest.of(data) == digest
        return data


@dataclass(frozen=True)
class Companions:
    """Blobs as companion files."""

    store: Store

    def put(self, data: bytes) -> Digest:
        return self.store.put_file(data)

    def get(self, digest: Digest, nbytes: int) -> bytes | None:
        return self.store.read_file(digest)


@dataclass(frozen=True)
class Fetched:
    """Blobs of a cache, in one form."""

    bucket: Bucket
    form: str

    def put(self, data: bytes) -> Digest:
        digest = Digest.of(data)
        Cache.open(self.bucket).tell(self.form).put_blob(digest, memoryview(data), self.form, element=2)
        return digest

    def get(self, digest: Digest, nbytes: int) -> bytes | None:
        return Substituters([self.bucket], Trust(()), fails).blob(digest, nbytes)


@dataclass(frozen=True)
class Index:
    """Realisations in the index of a store."""

    store: Store

    def realise(self, facts: Mapping[Digest, TensorRef]) -> None:
        self.store.realise(facts)

    def realisations(self, wanted: Mapping[Digest, TensorSpec]) -> Mapping[Digest, TensorRef]:
        return self.store.realisations(wanted)


@dataclass(frozen=True)
class Signed:
    """Realisations in a cache, claimed by as many signers as must agree."""

    bucket: Bucket
    quorum: int

    def realise(self, facts: Mapping[Digest, TensorRef]) -> None:
        cache = Cache.open(self.bucket)
        for signer in KEYS[: self.quorum]:
            for key, ref in facts.items():
                claim = outputs_claim(TRACES, key, [Output(key, ref)], signer)
                cache.put_claim(TRACES, key.hex, signer.name, claim)

    def realisations(self, wanted: Mapping[Digest, TensorSpec]) -> Mapping[Digest, TensorRef]:
        trust = Trust(tuple(key.public for key in KEYS), self.quorum)
        found = Substituters([self.bucket], trust, fails).realisations(wanted)
        return {key: claimed.ref for key, claimed in found.items()}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with Store.open(str(tmp_path / "store")) as opened:
        yield opened


@pytest.mark.parametrize("check", BLOBS)
class TestBlobs:
    def test_in_packs(self, store: Store, check: str) -> None:
        BLOBS[check](Packs(store))

    def test_as_companion_files(self, store: Store, check: str) -> None:
        BLOBS[check](Companions(store))

    @pytest.mark.parametrize("form", [RAW, GROUPED])
    def test_in_a_cache(self, bucket: Bucket, check: str, form: str) -> None:
        BLOBS[check](Fetched(bucket, form))


@pytest.mark.parametrize("check", REALISATIONS)
class TestRealisations:
    def test_in_the_index(self, store: Store, check: str) -> None:
        REALISATIONS[check](Index(store))

    @pytest.mark.parametrize("quorum", [1, 2])
    def test_in_a_cache(self, bucket: Bucket, check: str, quorum: int) -> None:
        REALISATIONS[check](Signed(bucket, quorum))


class Cut(Companions):
    """Loses the last byte of what is long."""

    def get(self, digest: Digest, nbytes: int) -> bytes | None:
        data = super().get(digest, nbytes)
        return data[:4096] if data else data


class Shapeless(Index):
    """Forgets what has no elements."""

    def realisations(self, wanted: Mapping[Digest, TensorSpec]) -> Mapping[Digest, TensorRef]:
        return {key: ref for key, ref in super().realisations(wanted).items() if ref.spec.numel}


def test_a_broken_contract_is_named(store: Store) -> None:
    check_blobs(Companions(store))
    check_realisations(Index(store))
    with pytest.raises(BrokenContract, match="a blob of 4097 bytes"):
        check_blobs(Cut(store))
    with pytest.raises(BrokenContract, match="what was recorded"):
        check_realisations(Shapeless(store))
