"""A parity report as cells and sentences, the same ones in every format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import cut, one_line

if TYPE_CHECKING:
    from ..parity.result import Check, ParityReport

__all__ = ["BASE_OFF_NOTE", "COLUMNS", "facts", "number", "reasons", "row"]

BASE_OFF_NOTE = (
    "base-off holds the export against PyTorch with the adapter's layers off: there a difference is what passes."
)


COLUMNS = ("comparison", "output", "abs error", "rel error", "cosine", "top-1", "result")


def row(check: Check) -> tuple[str, ...]:
    """The cells of one check under COLUMNS."""
    figures = check.figures
    if figures is None:
        return (check.variant, check.output, "-", "-", "-", "-", check.status)
    top1 = "-"
    if figures.top1 is not None:
        top1 = f"{100 * figures.top1:.4g} %"
        if figures.ties and check.variant != "base-off":
            top1 += f" ({figures.ties} tie{'s' if figures.ties > 1 else ''})"
    return (
        check.variant,
        check.output,
        number(figures.absolute),
        number(figures.relative),
        f"{figures.cosine:.7f}",
        top1,
        check.status,
    )


def facts(report: ParityReport) -> list[tuple[str, str]]:
    """What was compared and under which versions, as (name, value)."""
    main = [next(iter(shapes.values())) for shapes in report.inputs]
    shapes = ", ".join(" x ".join(map(str, shape)) for shape in main[:8]) + (", ..." if len(main) > 8 else "")
    return [
        ("model", report.model),
        ("adapter", report.adapter),
        ("weights", report.dtype + ("" if report.dtype == "float32" else _ROUNDED)),
        ("tolerance", f"{report.tolerance:g} relative (max |a-b| / max |b|)"),
        ("inputs", f"{len(main)} batches: {shapes}"),
        ("versions", ", ".join(f"{name} {value}" for name, value in report.versions.items())),
    ]


_ROUNDED = ", in PyTorch too, where the arithmetic is float32"


def reasons(report: ParityReport) -> list[str]:
    """One line per reason, naming the checks that it holds for; then why there are no layers."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for check in report.checks:
        if check.reason:
            grouped.setdefault((check.variant, check.status, check.reason), []).append(check.output)
    lines = [
        f"{variant}, {', '.join(outputs)}: {status}: {reason}" for (variant, status, reason), outputs in grouped.items()
    ]
    return [cut(one_line(line)) for line in [*lines, *filter(None, [report.layers_reason])]]


def number(value: float) -> str:
    """1.28e-06, 0, inf, nan."""
    return "0" if value == 0 else f"{value:.2e}"
