"""Bars of latencies as one SVG file, in the reader's light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .svg import escaped, shape, words

if TYPE_CHECKING:
    from ..bench.rounds import Figures

__all__ = ["bars"]

_STYLE = (
    "svg { --ink: #1b1f24; --soft: #5d6670; --line: #d5dae0; --paper: #ffffff; --bar: #2563b0; font: 12px system-ui, "
    "sans-serif; } @media (prefers-color-scheme: dark) { svg { --ink: #e6e9ed; --soft: #9aa4af; --line: #39414b; "
    "--paper: #14181d; --bar: #6cb0ff; } } text { fill: var(--soft); } .head { fill: var(--ink); font-weight: 600; }"
)
_WIDTH, _LEFT, _RIGHT, _ROW, _GAP, _NAME = 960, 300, 800, 20, 46, 42


def bars(figures: Sequence[Figures], title: str) -> str:
    """A bar for each figure, its median milliseconds, with a line to its 99 %; a group for each shape and part.

    Every group has a scale of its own, from 0.
    """
    groups: dict[tuple[int, int, str], list[Figures]] = {}
    for row in figures:
        groups.setdefault((row.batch, row.sequence, row.part), []).append(row)
    body, y = [words(16, 24, title, "start", "head")], 30.0
    for (batch, sequence, part), rows in groups.items():
        y += _GAP - _ROW
        body.append(words(16, y, f"{batch} x {sequence}, {part}", "start", "head"))
        scale = (_RIGHT - _LEFT) / max(row.p99_ms for row in rows)
        for row in rows:
            y += _ROW
            end, far = _LEFT + scale * row.p50_ms, _LEFT + scale * row.p99_ms
            name = row.deployment
            body.append(words(_LEFT - 8, y, name if len(name) <= _NAME else f"{name[: _NAME - 1]}…", "end"))
            body.append(shape("rect", x=float(_LEFT), y=y - 11, width=end - _LEFT, height=14.0, fill="var(--bar)"))
            body.append(shape("line", x1=end, x2=far, y1=y - 4, y2=y - 4, stroke="var(--soft)"))
            body.append(words(far + 8, y, f"{row.p50_ms:.3g} ms ({row.ratio:.2f})", "start"))
    height = y + 20
    spoken = "; ".join(f"{r.deployment} {r.batch} x {r.sequence} {r.part}: {r.p50_ms:.3g} ms" for r in figures)
    size = f'viewBox="0 0 {_WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escaped(spoken)}">'
    paper = shape("rect", width=_WIDTH, height=height, fill="var(--paper)")
    return "\n".join([head, f"<style>{_STYLE}</style>", paper, *body, "</svg>"]) + "\n"
