"""What the command lines share: options and exit codes, error paragraphs, missing extras, progress, what they print."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UserError, cut, one_line
from ..version import __version__

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    *("EXTRAS", "Parser", "command", "count", "evaluate_option", "named_paths", "plain", "positive", "print_json"),
    *("print_rows", "print_table", "print_warnings", "progress", "require_extra", "stdout_console"),
    "trust_remote_code_option",
]

EXTRAS = {
    "cpu": ("onnxruntime",),
    "export": ("torch", "transformers", "peft", "optimum", "requests", "accelerate", "onnx", "onnx_ir", "onnxscript"),
    "genai": ("onnxruntime_genai",),
    "serve": ("fastapi", "uvicorn", "tokenizers", "prometheus_client"),
}
"""Extra of the package -> the modules that it brings."""


def command(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command line's main(argv): returns its exit code; UserError -> one paragraph on stderr and 2.

    Exit codes: 0 done; 1 the parity check failed; 2 the input is at fault; 130 interrupted; 141 stdout was closed.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        try:
            code = main(argv)
            sys.stdout.flush()  # a reader that went away is met here, not when Python exits
            return code
        except UserError as error:
            return _refused(error)
        except KeyboardInterrupt as interrupt:
            print("; ".join(filter(None, ["interrupted", str(interrupt)])), file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader (head, less) went away. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            where = f"{error.filename}: " if error.filename is not None else ""
            return _refused(UserError(f"The system refuses: {where}{error.strerror or error}."))
        except MemoryError as error:
            return _refused(UserError(f"This needs more memory than there is here. {error}".rstrip()))
        except RecursionError:
            return _refused(UserError("Something in the input is nested too deeply. Fetch or save it again."))

    return wrapped


def _refused(error: UserError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse with --version and --json, whose every complaint is a UserError of one line."""

    def __init__(self, prog: str, description: str):
        super().__init__(prog=prog, description=description)
        self.add_argument("--version", action="version", version=f"{prog} {__version__}")
        self.add_argument("--json", action="store_true", help="print one JSON object to stdout, and nothing else")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{' '.join(message.split())} (see {self.prog} --help)")


def positive(text: str, kind: Callable[[str], float] = float) -> float:
    """An option's value: a finite number over zero."""
    with contextlib.suppress(ValueError):
        if 0 < (value := kind(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number over zero")


def count(text: str) -> int:
    """An option's value: a whole number over zero."""
    return int(positive(text, int))


def evaluate_option(parser: argparse.ArgumentParser) -> None:
    """--evaluate FILE.jsonl."""
    parser.add_argument(
        "--evaluate",
        metavar="FILE",
        type=Path,
        help='JSON lines of texts, as {"text": ..., "label": 1}: how many answers of the model as it is differ from '
        "PyTorch's in float32, and how many of either are right",
    )


def trust_remote_code_option(parser: argparse.ArgumentParser) -> None:
    """Adds --trust-remote-code, off by default, to a command that loads base models."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python that the base model and the tokenizer bring (auto_map), which is refused otherwise: your "
        "own, or what you have read",
    )


def require_extra(*extras: str) -> None:
    """Raises UserError with pip's line where modules of `extras` are missing; imports none of them, so it is quick."""
    missing = {name: extra for extra in extras for name in EXTRAS[extra] if find_spec(name) is None}
    if missing:
        lacking = dict.fromkeys(missing.values())
        instead = " (with an NVIDIA GPU: gpu in place of cpu)" if "cpu" in lacking else ""
        raise UserError(
            f"This needs {', '.join(missing)}, not installed here. Install what is missing: "
            f"`pip install 'loratrf-deploy[{','.join(lacking)}]'`{instead}."
        )


def named_paths(texts: Sequence[str], option: str = "--adapters") -> dict[str, Path]:
    """{NAME: PATH} of `option` NAME=PATH ..., in their order. Raises UserError for what isn't, or a name twice."""
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise UserError(f"{option} has {text!r}, expected NAME=PATH, such as fr=adapters/french.")
        if name in paths:
            raise UserError(
                f"{option} names {name!r} twice ({paths[name]} and {path}). Give each adapter its own name."
            )
        paths[name] = Path(path)
    return paths


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields step(text), which shows what is being done: a spinner and the time on a terminal, nothing in a pipe."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(file=sys.stderr)  # this stderr: `quiet` replaces sys.stderr later
    if not console.is_terminal:
        yield lambda text: None
        return
    columns = (SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda text: bar.update(task, description=one_line(text))


def stdout_console() -> Console:
    """rich on stdout. A pipe has no width of its own, and a cut table can't be read by a script."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)


def plain(text: str) -> str:
    """A stranger's text for one line of rich's: neither markup nor escape sequences nor line breaks, nor any length."""
    from rich.markup import escape

    return escape(cut(one_line(text)))


def print_rows(rows: Mapping[str, str | None]) -> None:
    """A line for each label and its text; none where there is no text."""
    console = stdout_console()
    for label, text in rows.items():
        if text:
            console.print(f"[bold]{label:<8}[/bold] {plain(text)}")


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """A table on stdout: `left` columns of text; numbers, aligned right, follow."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        text = number < left or name == "merged export"
        table.add_column(name, justify="left" if text else "right", no_wrap=True, overflow="fold")
    for row in rows:
        table.add_row(*map(plain, row))
    stdout_console().print(table)


def print_warnings(warnings: Iterable[str]) -> None:
    """A line for each: what is no error, and must not be overlooked."""
    for warning in warnings:
        stdout_console().print(plain(f"warning: {warning}"), style="yellow")


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on stdout. JSON has no numbers for NaN and Inf: they become "nan", "inf", "-inf"; paths, text."""
    finite = json.loads(json.dumps(values, default=str), parse_constant=lambda name: str(float(name)))
    print(json.dumps(finite, indent=2))
