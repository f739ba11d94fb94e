"""The one exception that means: the user's input is at fault, and the message says what to do."""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["UserError", "printable", "some"]


class UserError(ValueError):
    """What was wrong (with the values), what was expected, what to do: one paragraph, shown as it is.

    Command lines print it after "error: " and exit with code 2; library callers may catch it as a ValueError.
    """


def some(items: Collection[str], separator: str = ", ", limit: int = 5) -> str:
    """The first few items, and how many more there are: lists of names can run to hundreds."""
    shown = list(items)[:limit]
    rest = len(items) - len(shown)
    return separator.join(shown) + (f"{separator}and {rest} more" if rest else "")


def printable(text: str) -> str:
    """A stranger's text without control characters and lone surrogates: XML can't say them, terminals obey them."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "?", text)
