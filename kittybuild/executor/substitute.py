"""A tensor from a remote cache, straight into its place in a pack: verified while it streams, counted for NaN."""

from __future__ import annotations

from kittybuild.errors import RemoteError
from kittybuild.executor.feed import Sink
from kittybuild.executor.finite import nonfinite
from kittybuild.executor.realise import Made
from kittybuild.model.derivation import Derivation, StageTensor, Step
from kittybuild.planner.known import Known
from kittybuild.store.remote.substituters import Claimed
from kittybuild.tensors import TensorRef, TensorSpec


def substituted(known: Known, step: Step, stage: str, name: str, sink: Sink) -> Made | None:
    """Fetch tensor `name` of `stage` into `sink`. None: no cache has it, and what was written is void."""
    ref, offers = known.ref(step, stage, name), known.offers
    assert ref is not None  # the caller looked
    assert offers is not None
    count = _Finite(ref.spec)

    def write(offset: int, data: memoryview) -> None:
        sink.write(offset, data)
        count.add(data)

    xxh3 = offers.fetch(ref, write)
    if xxh3 is None:
        return None
    drv = known.plan.step(step) if isinstance(step, StageTensor) else step
    key = known.key(drv) if isinstance(drv, Derivation) else None
    return Made(ref, xxh3, key, count.total)


class _Finite:
    """Counts what is not finite in bytes that come in pieces of any size."""

    def __init__(self, spec: TensorSpec) -> None:
        self._dtype, self._rest, self.total = spec.dtype, b"", 0

    def add(self, data: memoryview) -> None:
        """The next bytes."""
        if not self._dtype.is_float:
            return
        if self._rest or len(data) % self._dtype.size:
            data = memoryview(self._rest + bytes(data))
        whole = len(data) - len(data) % self._dtype.size
        self.total += nonfinite(data[:whole], self._dtype)
        self._rest = bytes(data[whole:])


def check_claim(known: Known, made: Made, where: str) -> None:
    """Compare what was just made with what is claimed of it. Raises RemoteError KB805 where it was an audit."""
    if known.offers is None or made.key is None or (claimed := known.offers.claimed.get(made.key)) is None:
        return
    if claimed.ref == made.ref:
        return
    if known.offers.audits(made.key):
        raise _lie(where, made.ref, claimed)
    message = _lie(where, made.ref, claimed).message
    known.offers.caches.note(f"{where}: {message}: what was made here counts")


def _lie(where: str, made: TensorRef, claimed: Claimed) -> RemoteError:
    who = ", ".join(claimed.signers)
    hint = "trust that key no longer, and build again in a new store; or find out why machines differ"
    message = f"{who} signed that this tensor is {claimed.ref.digest}, but this machine makes {made.digest}"
    return RemoteError("KB805", message, at=where, hint=hint)
