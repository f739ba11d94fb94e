"""Regular expressions of strangers: matched as Python's `re` does, which is what PEFT calls, but in bounded time.

`re` can take for ever over a few characters, such as `(.*)*x`, and nothing stops it. The engine of `regex` gives up
when it is told to. Where the two read a pattern differently the pattern is refused: that is syntax which no module's
name needs.
"""

from __future__ import annotations

import re
import time
import warnings

import regex

from ..errors import UserError

__all__ = ["Matcher"]

_LONGEST = 10_000
_ONE_MATCH = 1.0
"""Seconds of processor time, which is how `regex` counts."""
_ALL_MATCHES = 10.0
"""Seconds, compiling included. An ordinary pattern takes some 10 µs a module."""

# Most patterns of a config are plain names, at the end of a path. Most paths end otherwise: no need to compile these.
_ENDING = re.compile(r"\(\.\*\\\.\)\?\((?:[A-Za-z0-9_.]*\.)?([A-Za-z0-9_]+)\)\$")


class Matcher:
    """Matches the patterns of `source`, an adapter, with one allowance of time for all of them together.

    Every method raises UserError where it is spent, or a pattern is none.
    """

    def __init__(self, source: object):
        self._source = source
        self._left = _ALL_MATCHES
        self._endings: dict[str, str] = {}
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def match(self, pattern: str, text: str) -> regex.Match[str] | None:
        """As re.match."""
        return self._run("match", pattern, text)

    def fullmatch(self, pattern: str, text: str) -> regex.Match[str] | None:
        """As re.fullmatch."""
        return self._run("fullmatch", pattern, text)

    def search(self, pattern: str, text: str) -> regex.Match[str] | None:
        """As re.search."""
        return self._run("search", pattern, text)

    def fault(self, pattern: str) -> str | None:
        """Why `pattern` is none that can be matched, in words; None where it is one."""
        begin = time.perf_counter()
        try:
            if not self._ending(pattern):
                _compile(pattern)
        except ValueError as error:
            return str(error)
        finally:
            self._spend(begin, pattern)
        return None

    def _run(self, how: str, pattern: str, text: str) -> regex.Match[str] | None:
        if not text.endswith((self._ending(pattern), "\n")):
            return None
        begin = time.perf_counter()
        found = None
        try:
            if pattern not in self._compiled:
                self._compiled[pattern] = _compile(pattern)
            found = getattr(self._compiled[pattern], how)(text, timeout=_ONE_MATCH)
        except TimeoutError:
            self._left = 0
        except ValueError as error:
            raise UserError(
                f"{self._source}: {_short(pattern)} can't be matched ({error}). Expected a regular expression "
                "over the names of modules. Correct it, or save the adapter again with PEFT."
            ) from error
        self._spend(begin, f"{pattern} on {text}")
        return found

    def _ending(self, pattern: str) -> str:
        """What every path ends with that a plain name matches; nothing for other patterns."""
        if pattern not in self._endings:
            found = _ENDING.fullmatch(pattern)
            self._endings[pattern] = found[1] if found else ""
        return self._endings[pattern]

    def _spend(self, begin: float, last: str) -> None:
        self._left -= time.perf_counter() - begin
        if self._left < 0:
            raise UserError(
                f"{self._source}: matching its regular expressions takes too long, the last one {_short(last)}. "
                "Expected patterns that match a name at once. Repetitions within repetitions, such as (.*)*, take "
                "exponential time, in PEFT too: list the modules by name instead."
            )


def _compile(pattern: str) -> regex.Pattern[str]:
    """`pattern` for an engine that can be stopped. ValueError, saying why, for what `re` refuses or reads otherwise."""
    if len(pattern) > _LONGEST:
        raise ValueError(f"it has {len(pattern)} characters, at most {_LONGEST} are read")
    # Compiling unrolls x{1000}, and such counts multiply.
    expanded = len(pattern)
    for count in re.findall(r"\{(\d{1,9})", pattern):
        expanded *= max(int(count), 1)
    if expanded > 10 * _LONGEST:
        raise ValueError("its repetitions multiply")
    # Ranges of Unicode letters take `re` minutes to compile.
    if not pattern.isascii() or re.search(r"\\[NUu]", pattern):
        raise ValueError("only ASCII characters are read")
    if re.search(r"\{(?!\d*,?\d*\})|\[:", pattern):
        raise ValueError("a brace that is no count such as {2,3}, or a class such as [:alpha:], is not read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
            return regex.compile(pattern)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (re.error, regex.error, OverflowError) as error:
        raise ValueError(str(error)) from error


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."
