"""What the three command lines share: exit codes, error paragraphs, quiet third-party libraries, progress."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import UserError

__all__ = ["command", "named_paths", "progress"]


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command line's main(argv): returns its exit code; UserError -> one paragraph on stderr and 2.

    Exit codes: 0 done; 1 the parity check failed; 2 the input is at fault; 130 interrupted.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader (head, less) went away. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141

    return wrapped


def named_paths(texts: Sequence[str]) -> dict[str, Path]:
    """{NAME: PATH} of --adapters NAME=PATH ..., in their order. Raises UserError for what isn't, or a name twice."""
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"--adapters has {text!r}, expected NAME=PATH, such as fr=adapters/french.")
        if name in paths:
            raise UserError(
                f"--adapters names {name!r} twice ({paths[name]} and {path}). Give each adapter its own name."
            )
        paths[name] = Path(path)
    return paths


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields step(text), which shows what is being done: a spinner on a terminal, nothing in a pipe."""
    from rich.console import Console

    console = Console(file=sys.stderr)  # this stderr: `quiet` replaces sys.stderr later
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)
