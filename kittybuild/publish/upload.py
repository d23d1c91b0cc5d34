"""An output folder into a repository on the Hub, as one commit: readers see the old model or the new one.

Large files go up before the commit, each once: what is there already, from a run that was cut, is not sent again. A
README that somebody edited there stays, unless it is to be replaced.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from kittybuild.checkpoint.sources.web import Resource, Web
from kittybuild.digest import Digest, Json
from kittybuild.errors import SourceError, UsageError
from kittybuild.model.lock import REPOSITORY
from kittybuild.publish.folder import PROVENANCE
from kittybuild.publish.provenance import README, Provenance
from kittybuild.publish.verify import file_names


@dataclass(frozen=True)
class Uploaded:
    """What a commit holds and deleted. `readme_kept`: the README there was edited, and stays."""

    repository: str
    commit: str
    files: tuple[str, ...]
    deleted: tuple[str, ...]
    readme_kept: bool

    def to_json(self) -> dict[str, Json]:
        """As `publish --json` prints it."""
        return {
            "repository": self.repository,
            "commit": self.commit,
            "files": list(self.files),
            "deleted": list(self.deleted),
            "readme_kept": self.readme_kept,
        }


def upload(
    folder: str, said: Provenance, repository: str, web: Web, *, private: bool = False, overwrite_readme: bool = False
) -> Uploaded:
    """Upload all files of a verified folder, but those that begin with a dot; the repository is made if there is none.

    Files that an earlier output put there, and this one does not have, are deleted. Raises UsageError, SourceError.
    """
    if not REPOSITORY.fullmatch(repository):
        raise UsageError("KB015", f"{repository!r:.80} cannot be a repository", hint="write ORGANISATION/NAME")
    there = _info(repository, web, private)
    siblings = {sibling.rfilename: sibling for sibling in there.siblings or ()}
    before = _story(there, siblings, web)
    names = list(file_names(folder))
    kept = not overwrite_readme and _edited(folder, there, siblings, before, web)
    if kept:
        names.remove(README)
    listed = [name for name in before.get("files", ()) if isinstance(name, str)]
    deleted = sorted(name for name in {*listed} & {*siblings} if name not in names and name != README)
    commit = web.ask(repository, lambda api: _commit(api, folder, said, repository, there.sha, names, deleted))
    return Uploaded(repository, commit.oid, tuple(names), tuple(deleted), kept)


def _commit(
    api: Any, folder: str, said: Provenance, repository: str, parent: str | None, names: list[str], deleted: list[str]
) -> Any:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [CommitOperationAdd(name, os.path.join(folder, *name.split("/"))) for name in names]
    return api.create_commit(
        repository,
        [*added, *(CommitOperationDelete(name) for name in deleted)],
        commit_message=f"{said.stage}, built with kittybuild",
        commit_description=f"root {said.root}",
        parent_commit=parent,
    )


def _info(repository: str, web: Web, private: bool) -> Any:
    """What the Hub says of the repository, which is made if there is none that we may read."""
    try:
        return web.info(repository, None)
    except SourceError as error:
        if error.code != "KB251":
            raise
    web.ask(repository, lambda api: api.create_repo(repository, private=private, exist_ok=True))
    return web.info(repository, None)


def _read(info: Any, sibling: Any, web: Web) -> bytes:
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    file = Resource(info.id, info.sha, sibling.rfilename, sibling.size, etag or "")
    return b"".join(data for _, data in web.read(file, 0, sibling.size))


def _story(info: Any, siblings: dict[str, Any], web: Web) -> dict[str, Any]:
    """The kittybuild.json that is there now; {} for none, or none that can be read."""
    if PROVENANCE not in siblings:
        return {}
    try:
        found = json.loads(_read(info, siblings[PROVENANCE], web))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _edited(folder: str, info: Any, siblings: dict[str, Any], before: dict[str, Any], web: Web) -> bool:
    """Whether the README there is neither ours now nor the one that an earlier output brought."""
    if README not in siblings:
        return False
    there = _read(info, siblings[README], web)
    with open(os.path.join(folder, README), "rb") as file:
        if file.read() == there:
            return False
    texts = before.get("texts")
    return not isinstance(texts, dict) or texts.get(README) != Digest.of(there).hex
