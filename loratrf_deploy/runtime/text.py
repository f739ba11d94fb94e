"""A folder's tokenizer.json, read with tokenizers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import read_regular

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TOKENIZER", "Written", "read_tokenizer"]

TOKENIZER = "tokenizer.json"
_LONGEST_CHARACTER = 8
"""Tokens: one for each byte of it, and some that are no text at all."""


def read_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer in `folder`, which neither pads nor truncates.

    Raises UserError where tokenizers isn't installed, or the file is none.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise UserError("Text needs tokenizers, not installed here: `pip install tokenizers`.") from error
    raw = read_regular(folder / TOKENIZER)
    try:
        tokenizer = Tokenizer.from_str(raw.decode())
    except Exception as error:  # plain exceptions
        raise UserError(f"{folder / TOKENIZER} is no tokenizer ({error}).") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class Written:
    """A text whose tokens are given one after the other."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # shown already; what a token says depends on the one before it
        self._new: list[int] = []

    def add(self, token: int | None) -> str:
        """What `token` adds; of a split character nothing before it is whole. None ends the text: what is left."""
        self._new += [] if token is None else [token]
        text = self._tokenizer.decode([*self._before, *self._new])
        if token is not None and text.endswith("\ufffd") and len(self._new) < _LONGEST_CHARACTER:
            return ""
        known = self._tokenizer.decode(self._before)
        self._before, self._new = self._new or self._before, []
        return text[len(known) :]
