"""JSON of strangers: no nesting that exhausts the stack, no key twice, no numbers that JSON lacks."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import numpy as np

__all__ = ["parse_json"]

_DEEPEST = 100
# To the end of the text where nothing ends it: every attempt succeeds, so that none is made twice.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def parse_json(raw: bytes, *, strict: bool = False) -> Any:
    """What the UTF-8 text `raw` says. ValueError for what isn't JSON, or is nested more than 100 deep.

    `strict` refuses an object that has a key twice, NaN, Infinity and half of a surrogate pair: Python's parser takes
    them, safetensors' doesn't.
    """
    # The parser calls itself, and how deep it gets depends on Python's version and the thread's stack.
    brackets = np.frombuffer(_STRING.sub(b"", raw).translate(None, _NOT_BRACKETS), np.uint8)
    # Of [ and { the second bit is set, of ] and } it isn't.
    depths = np.cumsum((brackets & 2).astype(np.int8) - 1, dtype=np.int32)
    if depths.max(initial=0) > _DEEPEST:
        raise ValueError(f"nested more than {_DEEPEST} deep")
    if not strict:
        return json.loads(raw.decode())
    said = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refused)
    if b"\\ud" in raw.lower():
        json.dumps(said, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name!r} twice")
    return found


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")
