"""A lock: what each source is, or was when an output was built. Facts only: no path beyond the recipe's words, no time.

`recipe.lock` and the lock in `kittybuild.json` hold the same pins; what a pin does not know it leaves out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kittybuild.digest import Digest, Json, tagged
from kittybuild.model.plan import Ignored

WORDS = ("hub", "revision", "path", "package", "file")
FACTS = ("commit", "repository", "version")
COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class FilePin:
    """One file of a source: its name in it, its size in bytes, the SHA-256 of its bytes, and its name in git.

    `sha256` or `git` may be unknown; what the Hub keeps in LFS has no `git` here.
    """

    name: str
    size: int
    sha256: str | None = None
    git: str | None = None

    def __post_init__(self) -> None:
        parts = self.name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\\" in self.name or not self.name.isprintable():
            raise ValueError(f"{self.name!r} is no name of a file in its folder")
        if self.size < 0:
            raise ValueError(f"{self.name!r} of {self.size} bytes")
        for value, form in ((self.sha256, _SHA256), (self.git, COMMIT)):
            if value is not None and not form.fullmatch(value):
                raise ValueError(f"{value!r:.80} is no digest of {self.name!r}")

    def to_json(self) -> dict[str, Json]:
        """What is known of it beside its name."""
        known: dict[str, Json] = {"size": self.size, "sha256": self.sha256, "git": self.git}
        return {key: value for key, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Pin:
    """One source: the recipe's words for it, facts (commit, repository, version) and its files, by name.

    `content` is over (name, digest, dtype, shape) of every tensor that a build read; `read` is their number.
    `quantized`: how many of the source's tensors are stored in each quantized type.
    """

    words: Mapping[str, str]
    files: tuple[FilePin, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
    content: Digest | None = None
    read: int = 0
    quantized: tuple[tuple[str, int], ...] = ()

    def to_json(self) -> dict[str, Json]:
        """The pin as `recipe.lock` and `kittybuild.json` hold it."""
        return {
            **self.words,
            **self.facts,
            "files": {file.name: file.to_json() for file in self.files},
            **({"content": self.content.hex, "read": self.read} if self.content else {}),
            **({"quantized": dict(self.quantized)} if self.quantized else {}),
        }

    @classmethod
    def from_json(cls, value: Any) -> Pin:
        """The pin of a `recipe.lock`; raises ValueError for what is none. Content and read are of builds only."""
        if not isinstance(value, dict) or not isinstance(value.get("files"), dict):
            raise ValueError("a pin has `files`")
        said = {key: value[key] for key in (*WORDS, *FACTS) if key in value}
        if not all(isinstance(word, str) for word in said.values()) or set(value) - {*said, "files"}:
            raise ValueError(f"a pin has texts for {', '.join((*WORDS, *FACTS))}, and nothing else beside `files`")
        files = tuple(_file(name, known) for name, known in sorted(value["files"].items()))
        words = {key: said[key] for key in WORDS if key in said}
        facts = {key: said[key] for key in FACTS if key in said}
        if "hub" in words:
            if not COMMIT.fullmatch(facts.get("commit", "")) or not REPOSITORY.fullmatch(facts.get("repository", "")):
                raise ValueError(f"the pin of {words['hub']!r:.80} has no commit and repository")
            if not all(file.sha256 or file.git for file in files):
                raise ValueError(f"the pin of {words['hub']!r:.80} has files without a digest")
        return cls(words, files, facts)

    @property
    def fingerprint(self) -> Digest:
        """The identity of the source as its pin tells it, wherever it lies and whatever it is called."""
        files = [[file.name, file.size, file.sha256 or file.git] for file in self.files]
        return tagged("kittybuild.pinned-source.v1", [self.words.get("file"), files])


def _file(name: Any, known: Any) -> FilePin:
    match known:
        case {"size": int(size), **more} if not set(more) - {"sha256", "git"}:
            sha256, git = more.get("sha256"), more.get("git")
            if isinstance(sha256, str | None) and isinstance(git, str | None):
                return FilePin(str(name), size, sha256, git)
    raise ValueError(f"the file {name!r:.80} has no size and digests")


def lock_json(pins: Mapping[str, Pin], versions: Mapping[str, str], ignored: Mapping[str, Ignored]) -> Json:
    """All pins by the names of their sources, the versions of what built with them, and for each stage that left
    tensors out what these are."""
    left_out = {
        stage: {rule: {model: list(names) for model, names in models.items()} for rule, models in rules.items()}
        for stage, rules in ignored.items()
        if rules
    }
    sources = {name: pin.to_json() for name, pin in pins.items()}
    return {"format": 2, "sources": sources, "versions": dict(versions), **({"ignored": left_out} if left_out else {})}


def lock_text(pins: Mapping[str, Pin]) -> str:
    """The text of `recipe.lock`: sorted, so that equal pins are equal texts and unequal ones differ line by line."""
    form = {"kittybuild.lock": 1, "sources": {name: pin.to_json() for name, pin in pins.items()}}
    return json.dumps(form, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def parse_lock(text: str | bytes) -> dict[str, Pin]:
    """The pins of a `recipe.lock` by source; raises ValueError for anything else."""
    try:
        form = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(form, dict) or form.get("kittybuild.lock") != 1 or not isinstance(form.get("sources"), dict):
        raise ValueError("not a lock of format 1")
    return {name: Pin.from_json(pin) for name, pin in form["sources"].items()}


def differences(before: Pin | None, after: Pin | None) -> tuple[str, ...]:
    """What another pin of a source says otherwise: facts and files, one line each."""
    old, new = ({file.name: file for file in pin.files} if pin else {} for pin in (before, after))
    lines = []
    for fact in (*WORDS, *FACTS):
        was, now = ({**pin.words, **pin.facts}.get(fact) if pin else None for pin in (before, after))
        if was != now and now:
            lines.append(f"{fact} {was} -> {now}" if was else f"{fact} {now}")
    if before is None:
        return (*lines, f"{len(new)} files, {sum(file.size for file in new.values())} bytes")
    if after is None:
        return ("no source of the recipe any more",)
    for name in sorted({*old, *new}):
        if name not in new:
            lines.append(f"removed {name}")
        elif name not in old:
            lines.append(f"added {name} ({new[name].size} bytes)")
        elif old[name] != new[name]:
            lines.append(f"changed {name} ({old[name].size} -> {new[name].size} bytes)")
    return tuple(lines)
