"""A tokenizer that was changed still does what the old one did: the library itself reads both, and a sample of texts.

Ids are those of the Vocabulary, one by one; texts without new tokens are encoded as before, or (where plain tokens are
new, and some text may become them) decoded to the same text, or to no less of it than before; every new added token is
found where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kittybuild.errors import KittybuildError, PlanError, SourceError
from kittybuild.tokens.output import Output
from kittybuild.tokens.reading import TOKENIZER
from kittybuild.tokens.vocabulary import Vocabulary

SAMPLE = (
    "The quick brown fox doesn't jump over 12,345.67 lazy dogs!\n\nIt's 3 o'clock.",
    "def f(x: int) -> dict:\n\treturn {'a': x ** 2}  # ok\n\n\n",
    "Größe, naïve café, 東京タワー, Привет мир, مرحبا, שלום, 한국어, हिन्दी, 🙂👍🏽, a\u0308 \u200d",
    "   three spaces,\t\ttabs\r\nand <b>html</b> \\n ...",
)
_REPORT = "please report this, with the tokenizer.json of the models"


def check_reading(files: Mapping[str, bytes], vocabulary: Vocabulary, where: str) -> None:
    """A tokenizer.json gives the ids that were read from it. Raises SourceError KB240."""
    if TOKENIZER not in files:
        return
    wrong = SourceError("KB240", "", at=f"{where}: {TOKENIZER}", hint="download or copy it again")
    _compare(_loaded(files[TOKENIZER], wrong), vocabulary, wrong)


def check_change(output: Output, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> None:
    """The output's tokenizer keeps what the lead's (`old`) did. Raises PlanError KB333.

    Where no token is new the files are the lead's, and there is nothing to check.
    """
    if not output.new:
        return
    wrong = PlanError("KB333", "", hint=_REPORT)
    before, after = _loaded(old[TOKENIZER], wrong), _loaded(new[TOKENIZER], wrong)
    _compare(after, output.vocabulary, wrong)
    added = [token for token in output.new if token in output.vocabulary.added]
    plain = len(added) < len(output.new)
    for text in SAMPLE:
        if any(token in text for token in added):
            continue
        was, now = _ids(before, text), _ids(after, text)
        if was is None:  # then there is nothing to keep
            continue
        if plain and now is not None:
            was, now = before.decode(was), after.decode(now)
        if was != now and not (plain and now is not None and was.strip() != text.strip() and _within(was, now, before)):
            raise _saying(wrong, f"{text!r} was {was!r}, and is {now!r}")
    found = set(_ids(after, " ".join(added)) or ())
    lost = [token for token in added if output.vocabulary.ids[token] not in found]
    if lost:
        raise _saying(wrong, f"the token {lost[0]!r} is not found in a text")


def _ids(tokenizer: Any, text: str) -> Any:
    """The ids of a text; None: the library refuses, as where a word is unknown and no token stands for that."""
    try:
        return tokenizer.encode(text).ids
    except Exception:  # what it raises is Exception itself
        return None


def _within(was: str, now: str, before: Any) -> bool:
    """Whether a tokenizer that loses some of a text loses no more of it than before: spaces and unknowns aside."""
    unknown = getattr(before.model, "unk_token", None) or " "
    letters = iter(now)
    return all(letter in letters for letter in "".join(was.replace(unknown, " ").split()))


def _loaded(data: bytes, wrong: KittybuildError) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # what the library raises is Exception itself
        raise _saying(wrong, f"not a tokenizer: {error}") from None


def _compare(tokenizer: Any, vocabulary: Vocabulary, wrong: KittybuildError) -> None:
    """Every token has the id that we think it has."""
    found = tokenizer.get_vocab(with_added_tokens=True)
    for token in vocabulary.unlisted:
        found.setdefault(token, vocabulary.ids[token])
    if found != vocabulary.ids:
        odd = next(token for token in {**vocabulary.ids, **found} if vocabulary.ids.get(token) != found.get(token))
        raise _saying(wrong, f"the token {odd!r} has the id {found.get(odd)}, not {vocabulary.ids.get(odd)}")


def _saying(error: KittybuildError, what: str) -> KittybuildError:
    return type(error)(error.code, f"the tokenizer is not what it should be: {what}", at=error.at, hint=error.hint)
