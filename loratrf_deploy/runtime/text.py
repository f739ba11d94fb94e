"""A folder's tokenizer.json, read with tokenizers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..files import read_regular

if TYPE_CHECKING:
    import tokenizers

__all__ = ["TOKENIZER", "read_tokenizer"]

TOKENIZER = "tokenizer.json"


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
