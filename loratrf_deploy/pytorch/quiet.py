"""Third parties that talk while they load, trace and build."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences what third-party libraries log, warn and print; exceptions still come through.

    What they ask is not asked: nobody would see the question, and what stdin has is no answer to it.
    """
    level, stdin = logging.root.manager.disable, sys.stdin
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        sys.stdin = io.StringIO()
        try:
            yield
        finally:
            sys.stdin = stdin
            logging.disable(level)
