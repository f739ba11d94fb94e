"""Pieces of an SVG picture, as text."""

from __future__ import annotations

from html import escape

from ..errors import one_line

__all__ = ["escaped", "shape", "words"]


def shape(tag: str, inside: str = "", /, **attributes: float | str) -> str:
    """<tag attribute="1.0">inside</tag>; floats have one digit behind the point."""
    given = " ".join(
        f'{name}="{value:.1f}"' if isinstance(value, float) else f'{name}="{value}"'
        for name, value in attributes.items()
    )
    return f"<{tag} {given}>{inside}</{tag}>" if inside else f"<{tag} {given}/>"


def words(x: float, y: float, what: str, anchor: str, kind: str = "") -> str:
    """Words at a point: where they begin, end or have their middle, by `anchor`."""
    named = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{named}>{escaped(what)}</text>'


def escaped(what: str) -> str:
    """A stranger's words on one line, escaped."""
    return escape(one_line(what))
