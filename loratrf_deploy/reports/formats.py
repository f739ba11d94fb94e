"""A parity report for people and for machines: terminal table, JSON, Markdown, HTML, JUnit XML."""

from __future__ import annotations

import html
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ..errors import UserError, cut, one_line
from .html import page
from .rows import BASE_OFF_NOTE, COLUMNS, facts, number, reasons, row

if TYPE_CHECKING:
    from rich.console import Console

    from ..parity.figures import Figures
    from ..parity.result import ParityReport

_CELL = 200
"""Characters of a cell of the table on a terminal."""

__all__ = [
    "FORMATS",
    "check_report_path",
    "print_report",
    "to_json",
    "to_junit",
    "to_markdown",
    "write_aside",
    "write_report",
]


def print_report(report: ParityReport, console: Console | None = None) -> None:
    """The report as a table on `console` (stdout when None), colours on a terminal only, then one line per finding."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if console is None:
        # A pipe has no width of its own, and a table cut to 80 columns can't be read by a script.
        console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    colours = {"passed": "green", "failed": "bold red", "skipped": "yellow", "no effect": "yellow"}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if 2 <= position <= 5 else "left", no_wrap=True)
    for check in report.checks:
        colour = colours[check.status]
        cells = (escape(cut(one_line(cell), _CELL)) for cell in row(check)[:-1])
        table.add_row(*cells, f"[{colour}]{check.status}[/{colour}]")
    console.print(table)
    for reason in reasons(report):
        console.print(escape(reason))
    colour = "green" if report.passed else "bold red"
    console.print(f"[{colour}]{escape(cut(one_line(report.verdict)))}[/{colour}]")


def write_report(report: ParityReport, path: str | Path) -> None:
    """Writes the report in the format that the suffix names, aside and then renamed. Raises UserError."""
    path = Path(path)
    check_report_path(path)
    write_aside(FORMATS[path.suffix](report), path)


def write_aside(text: str, path: Path) -> None:
    """Writes `text` to `path`, aside and then renamed. Raises UserError."""
    try:
        handle, aside = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(aside, 0o666 & ~umask)  # mkstemp's files are their owner's alone
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"The report {path} can't be written: {error.strerror or error}.") from error


def check_report_path(path: Path, formats: Collection[str] | None = None) -> None:
    """UserError where `path` is no report of `formats` that can be written; cheap, so that it can come before the work.

    `formats` None are a parity report's."""
    formats = FORMATS if formats is None else formats
    if path.suffix not in formats:
        raise UserError(f"--report {path}: unknown format {path.suffix!r}. Expected one of: {', '.join(formats)}.")
    if path.is_dir():
        raise UserError(f"--report {path} is a folder. Expected a file name, for example {path}/report{path.suffix}.")
    if not path.parent.is_dir():
        raise UserError(f"--report {path}: the folder {path.parent} does not exist. Create it first.")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--report {path}: no permission to write to {path.parent}. Choose a folder of your own.")


def to_json(report: ParityReport) -> str:
    """Everything that was measured, as JSON; NaN and Inf as strings."""
    return json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"


def to_markdown(report: ParityReport) -> str:
    """Verdict, one table of checks, one of the layers with the largest errors."""

    def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
        lines = [head, tuple("---" for _ in head), *(tuple(map(_markdown, line)) for line in rows)]
        return ["| " + " | ".join(line) + " |" for line in lines]

    lines = ["# Parity report", "", f"**{_markdown(report.verdict)}**", ""]
    lines += [f"- {name}: {_markdown(value)}" for name, value in facts(report)]
    lines += ["", *table(COLUMNS, [row(check) for check in report.checks]), "", BASE_OFF_NOTE]
    if found := reasons(report):
        lines += ["", *(f"- {_markdown(reason)}" for reason in found)]
    if report.layers:
        worst = sorted(report.layers, key=lambda layer: -(math.inf if math.isnan(layer.relative) else layer.relative))
        lines += ["", f"## Largest errors by layer ({report.layers_variant}; {len(report.layers)} compared)", ""]
        lines += table(
            ("layer", "operator", "rel error", "abs error"),
            [(layer.module, layer.op, number(layer.relative), number(layer.absolute)) for layer in worst[:10]],
        )
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """A stranger's text on one line, as it reads: neither HTML nor a link, an image, code or a cell's end."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(cut(one_line(text)), quote=False))


def to_junit(report: ParityReport) -> str:
    """JUnit XML, one test case per check; "no effect" counts as skipped, with its reason: it proves nothing."""
    counts = report.counts
    suite = ElementTree.Element(
        "testsuite",
        name="loratrf-parity",
        tests=str(len(report.checks)),
        failures=str(counts["failed"]),
        errors="0",
        skipped=str(counts["skipped"] + counts["no effect"]),
        time=f"{report.seconds:.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in facts(report):
        ElementTree.SubElement(properties, "property", name=name, value=one_line(value))
    for check in report.checks:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=f"parity.{one_line(Path(report.model).stem)}",
            name=cut(one_line(f"{check.variant}: {check.output}")),
        )
        if check.figures is not None:
            ElementTree.SubElement(case, "system-out").text = _figures_line(check.figures)
        if check.status == "failed":
            failure = ElementTree.Element("failure", type="parity", message=cut(one_line(check.reason)))
            failure.text = f"{_figures_line(check.figures)}\n{one_line(report.verdict)}"
            case.insert(0, failure)
        elif check.status != "passed":
            case.insert(0, ElementTree.Element("skipped", message=cut(one_line(f"{check.status}: {check.reason}"))))
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def to_html(report: ParityReport) -> str:
    """One self-contained page: verdict, figures, and the error by layer as a picture."""
    return page(report)


FORMATS: dict[str, Callable[[ParityReport], str]] = {
    ".json": to_json,
    ".md": to_markdown,
    ".html": to_html,
    ".xml": to_junit,
}
"""File suffix -> what makes the text of the report."""


def _figures_line(figures: Figures | None) -> str:
    if figures is None:
        return "not measured"
    top1 = "" if figures.top1 is None else f", top-1 {100 * figures.top1:.4g} % of {figures.choices}"
    return (
        f"max absolute error {number(figures.absolute)}, relative error {number(figures.relative)}, "
        f"cosine {figures.cosine:.7f}{top1}"
    )
