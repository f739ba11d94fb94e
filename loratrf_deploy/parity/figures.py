"""How far apart two outputs are: the figures of one comparison, in numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Figures", "compare", "relative_error", "valid", "worst"]

_SPANS = ("start_logits", "end_logits")


@dataclass(frozen=True)
class Figures:
    """absolute = max|a-b|; relative = max|a-b| / max|b|; cosine = ⟨a,b⟩/(‖a‖‖b‖); top1 = share of equal argmaxes.

    `top1` is None where an output has no classes to choose from. `ties` counts argmaxes that differ although both
    answers hold to the tolerance: b's two scores are closer than the two errors allowed. They lower top1, and are no
    failure. `choices` is the number of argmaxes, `values` the number of values compared.
    """

    absolute: float
    relative: float
    cosine: float
    top1: float | None
    ties: int
    choices: int
    values: int

    @property
    def flips(self) -> int:
        """Number of argmaxes that differ by more than a tie."""
        return 0 if self.top1 is None else round((1 - self.top1) * self.choices) - self.ties


def valid(value: NDArray, mask: NDArray[np.bool_] | None, name: str = "") -> NDArray:
    """`value` without padded tokens: (rows, ...) of the tokens in `mask` (B,S), or `value` where it has no token axis.

    A token axis is recognised by (B,S,...) in three or more dimensions; two are (B,S) in question answering's spans
    only, since a pooled output may be as wide as the sequence is long.
    """
    per_token = value.ndim > 2 or name in _SPANS
    if mask is None or not per_token or value.shape[:2] != mask.shape:
        return value
    return value[mask]


def relative_error(a: NDArray, b: NDArray, scale: float | None = None) -> tuple[float, float]:
    """(max|a-b| / max|b|, max|a-b|) in float64; inf where a has NaN or Inf and b has none, NaN where b has them.

    `scale` stands for max|b| where b is one of several batches.
    """
    if not a.size:
        return 0.0, 0.0
    a, b = a.astype(np.float64), b.astype(np.float64)
    if not np.isfinite(b).all():
        return math.nan, math.nan
    if not np.isfinite(a).all():
        return math.inf, math.inf
    absolute = float(np.abs(a - b).max())
    scale = float(np.abs(b).max()) if scale is None else scale
    return (absolute / scale if scale else math.inf if absolute else 0.0), absolute


def compare(
    a: NDArray,
    b: NDArray,
    *,
    name: str = "",
    mask: NDArray[np.bool_] | None = None,
    tolerance: float = 0.0,
    scale: float | None = None,
) -> Figures:
    """Figures of output `name`, `a` held against `b`, both of one shape; padded tokens (False in `mask`) don't count.

    Except that they must be finite: 0 · NaN is NaN in a mean over tokens. Shapes that differ are an infinite error.
    `scale` stands for max|b| where b is one of several batches.
    """
    if a.shape != b.shape:
        return Figures(math.inf, math.inf, 0.0, None, 0, 0, 0)
    x, y = valid(a, mask, name), valid(b, mask, name)
    relative, absolute = relative_error(x, y, scale)
    if not np.isfinite(a[np.isfinite(b)]).all():
        relative = absolute = math.inf
    top1, ties, choices = None, 0, 0
    if "logits" in name and a.shape[-1] > 1 and math.isfinite(relative):
        if name in _SPANS and mask is not None and mask.shape == a.shape:
            scores, wanted = (np.where(mask, value.astype(np.float64), -np.inf) for value in (a, b))
        else:
            scores, wanted = (value.reshape(-1, a.shape[-1]).astype(np.float64) for value in (x, y))
        chosen, right = scores.argmax(-1), wanted.argmax(-1)
        rows, choices = np.arange(len(right)), len(right)
        margin = wanted[rows, right] - wanted[rows, chosen]
        differ = chosen != right
        # Each score may be off by tolerance * max|b|, in opposite directions.
        allowed = tolerance * (np.abs(y).max(initial=0.0) if scale is None else scale)
        ties = int((differ & (margin <= 2 * allowed)).sum())
        top1 = 1.0 - float(differ.sum()) / choices if choices else None
    return Figures(absolute, relative, _cosine(x, y), top1, ties, choices, int(x.size))


def worst(figures: Sequence[Figures]) -> Figures:
    """One row for several batches: largest errors, smallest cosine, top1 over all choices together."""
    choices = sum(entry.choices for entry in figures)
    equal = sum(entry.top1 * entry.choices for entry in figures if entry.top1 is not None)
    return Figures(
        absolute=_largest([entry.absolute for entry in figures]),
        relative=_largest([entry.relative for entry in figures]),
        cosine=min((entry.cosine for entry in figures), key=lambda value: -math.inf if math.isnan(value) else value),
        top1=equal / choices if choices else None,
        ties=sum(entry.ties for entry in figures),
        choices=choices,
        values=sum(entry.values for entry in figures),
    )


def _largest(values: Sequence[float]) -> float:
    """max() that doesn't lose a NaN."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


def _cosine(a: NDArray, b: NDArray) -> float:
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not norms:
        return 1.0 if not a.any() and not b.any() else 0.0
    return float(np.clip(a @ b / norms, -1.0, 1.0))
