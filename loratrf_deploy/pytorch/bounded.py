"""PEFT matches a stranger's regular expressions too, with an engine that nothing stops: here it is lent another."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ..adapters.patterns import Matcher

__all__ = ["bounded_patterns"]

_LENT = threading.RLock()


@contextlib.contextmanager
def bounded_patterns(source: object) -> Iterator[None]:
    """Inside, what PEFT's modules call `re` is a `Matcher` for the adapter `source`: same answers, in bounded time.

    PEFT's own rules, and where it looks for which name, stay its own: it is the oracle of ours. One thread at a time.
    """
    import peft  # noqa: F401  (its modules are the ones to change)

    with _LENT:
        modules: list[Any] = [
            module
            for name, module in list(sys.modules.items())
            if name.partition(".")[0] == "peft" and getattr(module, "re", None) is re
        ]
        lent = _Re(Matcher(source))
        for module in modules:
            module.re = lent
        try:
            yield
        finally:
            for module in modules:
                module.re = re


class _Re:
    """The module `re`, whose questions about one pattern and one text a Matcher answers."""

    def __init__(self, matcher: Matcher):
        self.match, self.fullmatch, self.search = matcher.match, matcher.fullmatch, matcher.search

    def __getattr__(self, name: str) -> Any:
        return getattr(re, name)
