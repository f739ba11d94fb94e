"""The HTML report: one page without scripts or outside files, well-formed as XML, in the reader's light or dark."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .rows import BASE_OFF_NOTE, COLUMNS, facts, number, reasons, row
from .svg import escaped, shape, words

if TYPE_CHECKING:
    from ..parity.result import LayerError, ParityReport

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5d6670; --line: #d5dae0; --paper: #ffffff; --band: #f3f5f8;
  --good: #1a7f37; --bad: #c62828; --note: #8a5a00; --dot: #2563b0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #39414b; --paper: #14181d;
  --band: #1c2229; --good: #56c271; --bad: #ff7b72; --note: #e0b050; --dot: #6cb0ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 64rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.verdict { border-left: 4px solid; padding: .5rem .8rem; background: var(--band); font-weight: 600; }
.passed { color: var(--good); } .failed { color: var(--bad); } .skipped, .no-effect { color: var(--note); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.wide { white-space: normal; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
.figure { text-align: right; font-variant-numeric: tabular-nums; }
.soft { color: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .name { fill: var(--bad); font-weight: 600; }
svg .limit { fill: var(--bad); }
"""


def page(report: ParityReport) -> str:
    """The whole page as a string."""
    status = "passed" if report.passed else "failed"
    body = [
        "<h1>Parity report</h1>",
        f'<p class="verdict {status}">{escaped(report.verdict)}</p>',
        "<dl>",
        *(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts(report)),
        "</dl>",
        "<h2>Comparisons</h2>",
        *_table(COLUMNS, [(row(check), check.status) for check in report.checks], figures=range(2, 6)),
        f'<p class="soft">{escaped(BASE_OFF_NOTE)}</p>',
    ]
    if found := reasons(report):
        body += ["<ul>", *(f"<li>{escaped(reason)}</li>" for reason in found), "</ul>"]
    if report.layers:
        body += [
            "<h2>Error by layer</h2>",
            f'<p class="soft">Relative error of each layer\'s output, {escaped(report.layers_variant)}, in the order '
            "in which the layers run, on the batch with the largest error. Hollow points are exactly equal; hover over "
            "a point for its name.</p>",
            *_picture(report),
            f"<details><summary>All {len(report.layers)} layers"
            + (f" ({report.layers_skipped} more have no comparable value)" if report.layers_skipped else "")
            + "</summary>",
            *_table(
                ("layer", "operator", "rel error", "abs error", "result"),
                [
                    (
                        (layer.module, layer.op, number(layer.relative), number(layer.absolute), _word(layer)),
                        "failed" if layer.drifts else "",
                    )
                    for layer in report.layers
                ],
                figures=range(2, 4),
            ),
            "</details>",
        ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>',
            f"<title>Parity: {escaped(report.verdict)}</title><style>{_STYLE}</style></head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def _table(head: Sequence[str], rows: Iterable[tuple[Sequence[str], str]], figures: Iterable[int]) -> list[str]:
    """Rows are (cells, status); the last cell takes the status's colour."""
    right = set(figures)

    def cell(tag: str, column: int, text: str, extra: str = "") -> str:
        kinds = " ".join(filter(None, ("figure" if column in right else "", extra)))
        return f'<{tag} class="{kinds}">{escaped(text)}</{tag}>' if kinds else f"<{tag}>{escaped(text)}</{tag}>"

    lines = ['<div class="scroll"><table>', "<thead><tr>", *(cell("th", i, name) for i, name in enumerate(head))]
    lines.append("</tr></thead><tbody>")
    for cells, status in rows:
        last = len(cells) - 1
        classes = [status.replace(" ", "-") if i == last else "" for i in range(len(cells))]
        lines.append("<tr>" + "".join(cell("td", i, text, classes[i]) for i, text in enumerate(cells)) + "</tr>")
    return [*lines, "</tbody></table></div>"]


_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 948, 34, 300


def _picture(report: ParityReport) -> list[str]:
    """Points over the layers' order, error on a log scale; the tolerance as a line, the first drift by name."""
    layers, tolerance = report.layers, report.tolerance
    finite = [layer.relative for layer in layers if layer.relative > 0 and math.isfinite(layer.relative)]
    low = math.floor(math.log10(min([*finite, tolerance / 100])))
    high = math.ceil(math.log10(max([*finite, tolerance * 10])))
    step = (_RIGHT - _LEFT) / len(layers)

    def x(position: float) -> float:
        return _LEFT + step * (position + 0.5)

    def y(value: float) -> float:
        if not value > 0:  # exactly zero lies on the axis; NaN is drawn at the top
            return _TOP if math.isnan(value) else _BOTTOM
        share = (math.log10(value) - low) / (high - low) if math.isfinite(value) else 1.0
        return _BOTTOM - share * (_BOTTOM - _TOP)

    out = [f'<svg viewBox="0 0 960 340" role="img" aria-label="{escaped(_spoken(report))}">']
    for number_, (begin, end, label) in enumerate(_blocks(layers)):
        left, width = x(begin) - step / 2, (end - begin) * step
        if number_ % 2 == 0:
            out.append(shape("rect", x=left, y=_TOP, width=width, height=_BOTTOM - _TOP, fill="var(--band)"))
        if width >= 7 * len(label):
            out.append(words(left + width / 2, _BOTTOM + 18, label, "middle"))
    for decade in range(low, high + 1):
        at = y(10.0**decade)
        out.append(shape("line", x1=_LEFT, x2=_RIGHT, y1=at, y2=at, stroke="var(--line)"))
        if (decade - low) % math.ceil((high - low) / 8) == 0:
            out.append(words(_LEFT - 8, at + 4, f"1e{decade}", "end"))
    at = y(tolerance)
    dash: dict[str, float | str] = {"stroke": "var(--bad)", "stroke-width": 1.5, "stroke-dasharray": "6 4"}
    out.append(shape("line", x1=_LEFT, x2=_RIGHT, y1=at, y2=at, **dash))
    out.append(words(_RIGHT, at - 6, f"tolerance {tolerance:g}", "end", "limit"))
    radius = min(4.0, max(2.0, step / 2.5))
    for position, layer in enumerate(layers):
        colour = "var(--bad)" if layer.drifts else "var(--dot)"
        where: dict[str, float | str] = {"cx": x(position), "cy": y(layer.relative), "r": radius}
        where |= {"fill": "var(--paper)", "stroke": colour} if layer.relative == 0 else {"fill": colour}
        title = f"<title>{escaped(layer.module)} ({escaped(layer.op)}): {number(layer.relative)}</title>"
        out.append(shape("circle", title, **where))
    drift = report.first_drift
    if drift is not None:
        position = layers.index(drift)
        at_left = position < len(layers) / 2
        line: dict[str, float | str] = {"stroke": "var(--bad)", "stroke-width": 1}
        out.append(shape("line", x1=x(position), x2=x(position), y1=24, y2=y(drift.relative), **line))
        out.append(words(x(position), 18, f"drifts first: {drift.module}", "start" if at_left else "end", "name"))
    out.append(words((_LEFT + _RIGHT) / 2, 334, "layers in the order in which they run", "middle"))
    return [*out, "</svg>"]


def _blocks(layers: Sequence[LayerError]) -> list[tuple[int, int, str]]:
    """Runs of neighbours that belong to one numbered block of the model, as (first, past the last, its number)."""
    runs: list[tuple[int, int, str]] = []
    for position, layer in enumerate(layers):
        found = re.search(r"\.(?:layers?|h|blocks?)\.(\d+)\.", f".{layer.module}.")
        if not found:
            continue
        label = found.group(1)
        if runs and runs[-1][1:] == (position, label):
            runs[-1] = (runs[-1][0], position + 1, label)
        else:
            runs.append((position, position + 1, label))
    # "layer 11" where there is room, else the bare number: labels all of one form.
    width = (_RIGHT - _LEFT) / len(layers)
    if all((end - begin) * width >= 60 for begin, end, _ in runs):
        return [(begin, end, f"layer {label}") for begin, end, label in runs]
    return runs


def _spoken(report: ParityReport) -> str:
    largest = max((layer.relative for layer in report.layers if not math.isnan(layer.relative)), default=math.nan)
    return (
        f"Relative error of {len(report.layers)} layers on a logarithmic scale, at most {number(largest)}, beside the "
        f"tolerance {report.tolerance:g}. {report.verdict}"
    )


def _word(layer: LayerError) -> str:
    return "over the tolerance" if layer.drifts else ""
