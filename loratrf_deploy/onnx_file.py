"""Which files an ONNX file has its weights in, read without onnx: ONNX Runtime 1.23.2 opens any, 1.26 its own alone."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from .errors import UserError, cut
from .files import check_regular, open_regular, readable, stays_inside

__all__ = ["check_external_data", "external_files"]

# Protocol buffers: a message is fields, each a number and a wire type, then a varint, 4 or 8 bytes, or a length and so
# many bytes. Here, by message, the numbers of those fields that lead to a tensor, and the message that each one is.
_Message: TypeAlias = "dict[int, str]"
_MESSAGES: dict[str, _Message] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5
_MOST_FIELDS = 10_000_000
"""A graph of a thousand layers has a tenth; reading as many takes some seconds."""


def check_external_data(model: Path) -> None:
    """UserError where the ONNX file `model` has weights in a file outside of its folder, or in what is no file.

    What a stranger's model takes for its weights it can also give as its output. Files that are missing are left for
    ONNX Runtime to name.
    """
    for location in external_files(model):
        if not stays_inside(location):
            raise UserError(
                f"{model} has weights in {cut(location, 200)!r}, expected a file in its own folder. Export it again."
            )
        check_regular(model.parent / location, model.parent)


def external_files(model: Path) -> list[str]:
    """The locations of the external data in the ONNX file `model`. Raises UserError where it is not readable."""
    with open_regular(model) as file, readable(model):
        if not model.stat().st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            if raw.find(b"location") < 0:
                return []
            try:
                return sorted(set(_locations(raw)))
            except (ValueError, IndexError) as error:
                raise UserError(f"{model} is not a readable ONNX model ({error}). Export it again.") from error


def _locations(raw: mmap.mmap) -> Iterator[str]:
    """The value of every external_data entry that has the key "location", at any depth."""
    todo = [(0, len(raw), "model")]
    left = _MOST_FIELDS
    while todo:
        begin, end, message = todo.pop()
        fields, left = _fields(raw, begin, end, left)
        if message == "entry":
            if any(number == 1 and raw[at:to] == b"location" for number, at, to in fields):
                yield from (raw[at:to].decode() for number, at, to in fields if number == 2)
            continue
        inner = _MESSAGES[message]
        todo += [(at, to, inner[number]) for number, at, to in fields if number in inner]


def _fields(raw: mmap.mmap, at: int, end: int, left: int) -> tuple[list[tuple[int, int, int]], int]:
    """(number, begin, end) of the fields that have a length, of the message in raw[at:end]; and `left` without all."""
    found = []
    while at < end:
        left -= 1
        if not left:
            raise ValueError(f"it has more than {_MOST_FIELDS:,} fields")
        tag, at = _varint(raw, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, at = _varint(raw, at)
        elif kind in (_EIGHT, _FOUR):
            at += 8 if kind == _EIGHT else 4
        elif kind == _LENGTH:
            length, at = _varint(raw, at)
            if at + length > end:
                raise ValueError("a field is longer than what holds it")
            found.append((number, at, at + length))
            at += length
        else:  # groups, which nobody writes
            raise ValueError(f"a field of the kind {kind}")
    if at != end:
        raise ValueError("a field is longer than what holds it")
    return found, left


def _varint(raw: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
