"""The pieces of a sentencepiece model, read from its bytes: texts, kinds, and the algorithm. Nothing else of it.

The file is one protobuf message (sentencepiece_model.proto, release 0.2): field 1 is a piece, field 2 how it was
trained. Fields that are not known are passed over, as protobuf wants it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_PIECE, _TRAINER = 1, 2
_TEXT, _TYPE = 1, 3
_MODEL_TYPE, _BPE = 3, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece; its id is its place. `control`: no text becomes it; `user_defined`: found as it stands."""

    text: str
    control: bool
    user_defined: bool


def read_pieces(data: bytes) -> tuple[tuple[Piece, ...], bool]:
    """All pieces, and whether text is split by merges (BPE) instead of by likelihood (unigram).

    Raises ValueError where the bytes are no such message, or it has no pieces.
    """
    pieces = []
    bpe = False
    for field, value in _fields(data):
        if field == _PIECE and isinstance(value, bytes):
            inner = dict(_fields(value))
            text, kind = inner.get(_TEXT), inner.get(_TYPE, 1)
            if not isinstance(text, bytes):
                raise ValueError("a piece without text")
            pieces.append(Piece(text.decode(), kind in (_UNKNOWN, _CONTROL), kind == _USER_DEFINED))
        elif field == _TRAINER and isinstance(value, bytes):
            bpe = dict(_fields(value)).get(_MODEL_TYPE) == _BPE
    if not pieces:
        raise ValueError("no sentencepiece model")
    return tuple(pieces), bpe


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message by number: integers as they are, all else as bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        field, wire = key >> 3, key & 7
        if wire == 0:
            number, place = _varint(data, place)
            yield field, number
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("no sentencepiece model")
        if place + size > len(data):
            raise ValueError("the sentencepiece model ends early")
        yield field, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            raise ValueError("the sentencepiece model ends early")
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
    raise ValueError("no sentencepiece model")
