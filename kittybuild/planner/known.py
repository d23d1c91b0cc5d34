"""What is known of a plan's tensors without computing any: contents from source memos and realisations.

A derivation's content is known when the contents of its inputs are, and somebody realised the resolved key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from kittybuild.checkpoint.source import RAW, Entry, FileId
from kittybuild.digest import Digest, tagged
from kittybuild.errors import SourceError
from kittybuild.model.derivation import Derivation, Input, SourceTensor, StageTensor, Step
from kittybuild.model.plan import Plan, inputs_of
from kittybuild.planner.offers import Offers
from kittybuild.planner.views import Sources
from kittybuild.store.store import Location, Store
from kittybuild.tensors import TensorRef


class Known:
    """The contents known so far, and where they lie. Looked up in bulk, stage by stage; never forgets."""

    def __init__(self, plan: Plan, sources: Sources, store: Store | None, offers: Offers | None = None) -> None:
        self.plan, self.sources, self.store, self.offers = plan, sources, store, offers
        self._listed = {file for checkpoint in sources.checkpoints.values() for file in checkpoint.files}
        self._file_ids: dict[str, FileId] = {}
        self._memos: dict[str, Mapping[str, Digest]] = {}
        self._refs: dict[Input, TensorRef] = {}
        self._locations: dict[Digest, Location] = {}

    def entry(self, tensor: SourceTensor) -> Entry:
        """Where a source keeps a tensor."""
        return self.sources.checkpoints[tensor.source].entry(tensor.name)

    def file_id(self, path: str) -> FileId:
        """The identity of a source file, which is still the one whose header was read. Raises SourceError."""
        if path not in self._file_ids:
            self._file_ids[path] = self._identify(path)
        return self._file_ids[path]

    def memo_name(self, entry: Entry) -> str:
        """Under which name the memo of its file keeps the digest of a tensor: decoded tensors count by their decoder,
        and by the other files that it reads; plain ones in a pinned file by their place, whatever they are called."""
        if entry.encoding == RAW and not self.file_id(entry.file).content:
            return entry.name
        return pinned_memo_name(entry, [self.file_id(path).key() for path in entry.files[1:]])

    def check_unchanged(self, path: str) -> None:
        """Raise SourceError KB210 if a source file is not the one whose header was read any more."""
        before = self.file_id(path)
        if not before.content and self._identify(path) != before:
            raise _changed(path)

    def _identify(self, path: str) -> FileId:
        try:
            found = self.sources.identity(path)
        except OSError as error:
            hint = "it was there when the build began"
            raise SourceError("KB201", f"cannot read: {error.strerror}", at=path, hint=hint) from error
        if not found.content and found not in self._listed:
            raise _changed(path)
        return found

    def ref(self, step: Step, stage: str = "", name: str = "") -> TensorRef | None:
        """The content of an input, or of the derivation behind tensor `name` of `stage`, if it is known."""
        if isinstance(step, Derivation):
            return self._refs.get(StageTensor(stage, name, step.spec))
        if isinstance(step, SourceTensor) and step not in self._refs:
            self._recall(step)
        return self._refs.get(step)

    def _recall(self, tensor: SourceTensor) -> None:
        entry = self.entry(tensor)
        if digest := self._memo(entry.file).get(self.memo_name(entry)):
            self._refs[tensor] = TensorRef(digest, tensor.spec)

    def _memo(self, path: str) -> Mapping[str, Digest]:
        if path not in self._memos:
            file = self.file_id(path)
            self._memos[path] = self.store.memos(file.key()) if self.store else {}
            if self.store and not file.whole:  # what was once seen in the verified file counts more
                self._memos[path] = {**self._memos[path], **self.store.memos(replace(file, whole=True).key())}
        return self._memos[path]

    def learn(self, step: Input, ref: TensorRef) -> None:
        """Note a content that was just found."""
        self._refs[step] = ref

    def key(self, drv: Derivation) -> Digest | None:
        """The resolved key of a derivation, if all its inputs are known."""
        refs = [self.ref(given) for given in drv.inputs]
        return drv.key(refs) if all(refs) else None  # type: ignore[arg-type]

    def look_up(self, stage: str) -> None:
        """Learn what the tensors of a stage, whose inputs are known, were realised to: of the store, then of caches."""
        if self.store is not None:
            self._remember(stage, self.store)
        if self.offers is not None:
            self._ask(stage, self.offers)

    def _remember(self, stage: str, store: Store) -> None:
        keys: dict[Digest, list[StageTensor]] = {}
        for name, drv in self.plan.stages[stage].derivations.items():
            tensor = StageTensor(stage, name, drv.spec)
            if tensor not in self._refs and (key := self.key(drv)):
                keys.setdefault(key, []).append(tensor)
        for key, ref in store.realisations(keys).items():
            for tensor in keys[key]:
                self._refs[tensor] = ref

    def _ask(self, stage: str, offers: Offers) -> None:
        """Learn from caches what is not known here, or not here any more."""
        drvs = self.plan.stages[stage].derivations
        keys = {name: self.key(drv) for name, drv in drvs.items()}
        tensors = {name: StageTensor(stage, name, drv.spec) for name, drv in drvs.items()}
        self.locate([ref.digest for tensor in tensors.values() if (ref := self._refs.get(tensor))])
        lacking = {
            name: key
            for name, key in keys.items()
            if key is not None and ((ref := self._refs.get(tensors[name])) is None or self.location(ref.digest) is None)
        }
        whole = [key for key in keys.values() if key is not None] if all(keys.values()) else None
        found = offers.ask({key: drvs[name].spec for name, key in lacking.items()}, whole)
        for name, key in lacking.items():
            if key in found:
                self._refs.setdefault(tensors[name], found[key].ref)

    def sources_of(self, step: Step) -> Iterator[SourceTensor]:
        """All source tensors behind a step."""
        if isinstance(step, SourceTensor):
            yield step
        else:
            for given in inputs_of(step) if isinstance(step, Derivation) else (self.plan.step(step),):
                yield from self.sources_of(given)

    def memo_key(self, tensor: SourceTensor) -> tuple[Digest, str]:
        """Under which file and name the store remembers a source tensor."""
        entry = self.entry(tensor)
        return self.file_id(entry.file).key(), self.memo_name(entry)

    def lease(self, step: Step) -> Digest:
        """What stands for a derivation whose inputs may be unknown: the same for all who build from the same files."""
        if isinstance(step, StageTensor):
            return self.lease(self.plan.step(step))
        if isinstance(step, SourceTensor):
            file, name = self.memo_key(step)
            return tagged("kittybuild.lease-source.v1", [file.hex, name])
        inputs = [self.lease(given).hex for given in step.inputs]
        form = [step.builder, step.version, step.params, inputs, step.output.to_json(), step.numerics]
        return tagged("kittybuild.lease.v1", form)

    def ask_again(self, drv: Derivation) -> tuple[Digest, TensorRef] | None:
        """The key of a derivation and what it makes, if another process has recorded it since we looked."""
        if self.store is None:
            return None
        unknown = {self.memo_key(source): source for source in self.sources_of(drv) if self.ref(source) is None}
        for memo, digest in self.store.some_memos(unknown).items():
            self.learn(unknown[memo], TensorRef(digest, unknown[memo].spec))
        for given in drv.inputs:
            step = self.plan.step(given) if isinstance(given, StageTensor) else given
            if isinstance(step, Derivation) and self.ref(given) is None and (found := self.ask_again(step)):
                self.learn(given, found[1])
        key = self.key(drv)
        ref = self.store.realisation(key) if key else None
        return (key, ref) if key and ref else None

    def locate(self, digests: Iterable[Digest]) -> None:
        """Learn where contents lie in the store."""
        wanted = [digest for digest in dict.fromkeys(digests) if digest not in self._locations]
        if self.store is not None and wanted:
            self._locations.update(self.store.locations(wanted))

    def location(self, digest: Digest) -> Location | None:
        """Where the store holds a content, if it does."""
        if digest not in self._locations:
            self.locate([digest])
        return self._locations.get(digest)

    def forget_places(self) -> None:
        """Forget where contents lie: packs that were finished meanwhile have other paths."""
        self._locations.clear()

    def contents(self) -> tuple[tuple[Input, TensorRef], ...]:
        """Everything known so far."""
        return tuple(self._refs.items())


def pinned_memo_name(entry: Entry, others: Iterable[Digest]) -> str:
    """The name of a tensor in the memo of a pinned file. `others`: the keys of the other files that it reads."""
    if entry.encoding == RAW:
        return f"{entry.offset}+{entry.nbytes}"
    return "/".join([entry.encoding, "1", *(key.hex for key in others), entry.name])


def _changed(path: str) -> SourceError:
    hint = "build again when nothing writes to it"
    return SourceError("KB210", "the file changed during the build", at=path, hint=hint)
