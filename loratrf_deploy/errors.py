"""The one exception that means: the user's input is at fault, and the message says what to do."""

from __future__ import annotations

import re
from collections.abc import Collection

__all__ = ["UserError", "cut", "one_line", "printable", "some"]

_MOST = 1000
"""Characters of a paragraph. Our own stay below; what a stranger wrote can be of any length."""
_MOST_OF_AN_ITEM = 300


class UserError(ValueError):
    """What was wrong (with the values), what was expected, what to do: one paragraph, shown as it is.

    Command lines print it after "error: " and exit with code 2; library callers may catch it as a ValueError. The
    message quotes strangers' files and other libraries: whatever they say, it is one printable line of at most 1,000
    characters, of which the middle is left out where it would be longer: what to do comes last.
    """

    def __init__(self, message: str):
        super().__init__(cut(one_line(message)))


def some(items: Collection[str], separator: str = ", ", limit: int = 5) -> str:
    """The first few items, and how many more there are: lists run to hundreds of names, and a name to any length."""
    shown = [cut(item, _MOST_OF_AN_ITEM) for item in list(items)[:limit]]
    rest = len(items) - len(shown)
    return separator.join(shown) + (f"{separator}and {rest} more" if rest else "")


def printable(text: str) -> str:
    """A stranger's text without what XML can't say and terminals obey: control characters, lone surrogates, and the
    marks that turn the direction of what follows. Line breaks and tabs stay."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]", "?", text)


def one_line(text: str) -> str:
    """A stranger's text, printable and without line breaks: a second line could pass for one of ours."""
    return printable(re.sub(r"[\n\r\t\v\f\x85\u2028\u2029]\s*", " ", text))


def cut(text: str, limit: int = _MOST) -> str:
    """`text`, or its beginning and its end where it has more than `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 7) // 2
    return f"{text[:half]} [...] {text[-half:]}"
