"""The one exception that means: the user's input is at fault, and the message says what to do."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """What was wrong (with the values), what was expected, what to do: one paragraph, shown as it is.

    Command lines print it after "error: " and exit with code 2; library callers may catch it as a ValueError.
    """
