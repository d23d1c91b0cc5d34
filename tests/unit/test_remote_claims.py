"""Claims: what is signed is all that is said, and nothing else is believed. And what is worth fetching."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kittybuild.digest import Digest
from kittybuild.errors import RemoteError
from kittybuild.planner.offers import ALWAYS, AUTO, RATE, Offers
from kittybuild.store.remote import names
from kittybuild.store.remote.claims import (
    Output,
    Refused,
    SourceFacts,
    outputs_claim,
    outputs_of,
    source_claim,
    source_of,
    stage_key,
)
from kittybuild.store.remote.keys import PublicKey, SigningKey
from kittybuild.store.remote.substituters import Claimed, Substituters, Trust
from kittybuild.tensors import DType, TensorRef, TensorSpec

KEY = SigningKey("team-1", bytes(range(32)))
OUTPUTS = [
    Output(Digest.of(bytes([n])), TensorRef(Digest.of(b"t"), TensorSpec(DType.BF16, (2, 3))), 5) for n in range(3)
]
ABOUT = stage_key(output.key for output in OUTPUTS)
STAGE = outputs_claim("stages", ABOUT, OUTPUTS, KEY)
FACTS = SourceFacts(100, None, (Digest.of(b"h"), 10), {"10+90": Digest.of(b"t")})
SHA256 = "ab" * 32


def test_what_is_signed_is_read_again() -> None:
    assert outputs_of("stages", ABOUT, STAGE, KEY.public) == tuple(OUTPUTS)
    assert source_of(SHA256, source_claim(SHA256, FACTS, KEY), KEY.public) == FACTS


@given(st.integers(0, len(STAGE) - 1), st.integers(1, 255))
def test_no_changed_byte_is_believed(at: int, by: int) -> None:
    changed = STAGE[:at] + bytes([STAGE[at] ^ by]) + STAGE[at + 1 :]
    try:
        found = outputs_of("stages", ABOUT, changed, KEY.public)
    except Refused:
        return
    assert found == tuple(OUTPUTS), "another writing of the same JSON"
    assert json.loads(changed) == json.loads(STAGE)


@given(st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
    lambda value: json.dumps(value).encode()
))  # fmt: skip
def test_no_other_bytes_are_believed(data: bytes) -> None:
    with pytest.raises(Refused):
        outputs_of("stages", ABOUT, data, KEY.public)
    with pytest.raises(Refused):
        source_of(SHA256, data, KEY.public)


def test_a_claim_is_of_one_kind_about_one_thing() -> None:
    trace = outputs_claim("traces", OUTPUTS[0].key, OUTPUTS[:1], KEY)
    for kind, about in (("stages", OUTPUTS[0].key), ("traces", OUTPUTS[1].key)):
        with pytest.raises(Refused):
            outputs_of(kind, about, trace, KEY.public)
    with pytest.raises(Refused, match="other derivations"):
        outputs_of("traces", OUTPUTS[0].key, outputs_claim("traces", OUTPUTS[0].key, OUTPUTS[1:2], KEY), KEY.public)
    with pytest.raises(Refused):
        source_of("cd" * 32, source_claim(SHA256, FACTS, KEY), KEY.public)


def test_a_key_is_written_as_nix_writes_it() -> None:
    assert PublicKey.parse(str(KEY.public)) == KEY.public
    assert repr(KEY) == "SigningKey(name='team-1')"
    for text in ("", "team", "team-1", "team-1:", "team-1:AAAA", "../x-1:AAAA", "team:" + str(KEY.public)[7:]):
        with pytest.raises(RemoteError, match="not a"):
            PublicKey.parse(text)


@pytest.mark.parametrize("signer", ["..", "../../x-1", "a/b-1", "x", "", "x-1\n", "x-1.json/.."])
def test_no_name_of_a_signer_leads_elsewhere(signer: str) -> None:
    with pytest.raises(ValueError, match="not the name"):
        names.claim("traces", "0" * 64, signer)


@pytest.mark.parametrize("about", ["..", "0" * 63, "0" * 63 + "/", "G" * 64])
def test_no_subject_leads_elsewhere(about: str) -> None:
    with pytest.raises(ValueError, match="nobody claims"):
        names.claim("sources", about, "team-1")


class Caches(Substituters):
    """Caches as fast as a test says: bytes a second."""

    def __init__(self, speed: float | None) -> None:
        super().__init__((), Trust(()), print)
        self.speed = speed

    def seconds(self, nbytes: int) -> float | None:
        return nbytes / self.speed if self.speed else None


def offered(mode: str, speed: float | None, ms: int | None) -> tuple[Offers, TensorRef]:
    ref = TensorRef(Digest.of(b"t"), TensorSpec(DType.BF16, (1_000_000,)))
    offers = Offers(Caches(speed), mode)
    offers._offered[ref.digest] = ms
    return offers, ref


@pytest.mark.parametrize(
    ("speed", "ms", "here", "worth"),
    [
        (None, None, True, True),
        (2e6, 999, True, False),
        (2e6, 1001, True, True),
        (2e6, 1, False, True),
        (RATE / 4, None, True, False),
        (RATE, None, True, True),
    ],
    ids=["unknown speed", "slower", "faster", "no source", "slow line", "fast line"],
)
def test_what_is_faster_to_fetch_is_fetched(speed: float | None, ms: int | None, here: bool, worth: bool) -> None:
    offers, ref = offered(AUTO, speed, ms)
    assert offers.worth(ref, 2 * ref.spec.nbytes, here=here) is worth
    always, _ = offered(ALWAYS, speed, ms)
    assert always.worth(ref, 0, here=True)
    assert not offers.worth(TensorRef(Digest.of(b"other"), ref.spec), 0, here=False)


def test_an_audit_takes_its_share_and_each_time_another() -> None:
    keys = [Digest.of(bytes([n // 256, n % 256])) for n in range(4000)]
    claimed = {key: Claimed(OUTPUTS[0].ref, ("team-1",)) for key in keys}
    chosen = [
        {key for key in keys if Offers(Caches(None), AUTO, 0.1, seed, claimed).audits(key)} for seed in (b"a", b"b")
    ]
    assert all(300 < len(some) < 500 for some in chosen)
    assert len(chosen[0] & chosen[1]) < 100
    assert not Offers(Caches(None), AUTO, 1.0, b"a").audits(keys[0]), "nobody claims anything of it"
