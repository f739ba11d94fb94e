"""From outputs on both sides to verdicts: within the tolerance, or not; and whether the adapter has an effect."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..pytorch.base import Outputs
from .figures import Figures, compare, valid, worst
from .onnx_runs import NotComparable
from .result import VARIANTS, Check

__all__ = ["EFFECT", "TOLERANCES", "effect_checks", "parity_checks", "worst_batch"]

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest relative error, max|a-b| / max|b|, by dtype of the weights; bfloat16 is 8 times as coarse as float16."""


EFFECT = 10.0
"""The adapter has an effect where it changes an output by more than this many tolerances."""


def parity_checks(
    variant: str,
    run: list[Outputs] | UserError,
    outputs: Sequence[str],
    expected: Sequence[Outputs],
    masks: Sequence[NDArray[np.bool_] | None],
    tolerance: float,
) -> list[Check]:
    if isinstance(run, UserError):
        status = "skipped" if isinstance(run, NotComparable) else "failed"
        return [Check(variant, name, status, str(run)) for name in outputs]
    checks = []
    for name in outputs:
        figures = _over_batches(run, expected, name, masks, tolerance)
        if any(got[name].shape != right[name].shape for got, right in zip(run, expected, strict=True)):
            reason = f"shape {run[0][name].shape}, PyTorch gives {expected[0][name].shape}"
        elif np.isnan(figures.relative):
            reason = "PyTorch's own output has NaN or Inf, so nothing can be compared"
        elif np.isinf(figures.absolute):
            reason = "NaN or Inf where PyTorch's output is finite"
        elif figures.relative > tolerance:
            reason = f"relative error {figures.relative:.2e}, tolerance {tolerance:g}"
        elif figures.flips:
            reason = f"{figures.flips} of {figures.choices} top-1 answers differ"
        else:
            reason = ""
        checks.append(Check(variant, name, "failed" if reason else "passed", reason, figures))
    return checks


def effect_checks(
    run: list[Outputs],
    outputs: Sequence[str],
    expected: Sequence[Outputs],
    base_off: Sequence[Outputs],
    masks: Sequence[NDArray[np.bool_] | None],
    tolerance: float,
) -> list[Check]:
    """Whether the export differs from PyTorch with the adapter's layers off by clearly more than the tolerance."""
    checks = []
    for name in outputs:
        exported = _over_batches(run, base_off, name, masks, tolerance)
        true = _over_batches(expected, base_off, name, masks, tolerance).relative
        status, reason = "passed", ""
        if not exported.relative > EFFECT * tolerance:
            if true > EFFECT * tolerance:
                status = "failed"
                reason = (
                    f"the export equals the base model without the adapter (relative difference "
                    f"{exported.relative:.2e}); in PyTorch the adapter makes a difference of {true:.2e}"
                )
            else:
                status = "no effect"
                reason = (
                    f"the adapter itself changes nothing that could be told from rounding: relative difference "
                    f"{true:.2e} in PyTorch, looked for more than {EFFECT * tolerance:g}"
                )
        checks.append(Check(VARIANTS[2], name, status, reason, exported))
    return checks


def _over_batches(
    run: Sequence[Outputs],
    expected: Sequence[Outputs],
    name: str,
    masks: Sequence[NDArray[np.bool_] | None],
    tolerance: float,
) -> Figures:
    """Figures over all batches together: a row with an undecided answer, scores near 0, has no scale of its own."""
    compared = [valid(right[name], mask, name) for right, mask in zip(expected, masks, strict=True)]
    scale = max(float(np.abs(value.astype(np.float64)).max(initial=0.0)) for value in compared)
    return worst(
        [
            compare(got[name], right[name], name=name, mask=mask, tolerance=tolerance, scale=scale)
            for got, right, mask in zip(run, expected, masks, strict=True)
        ]
    )


def worst_batch(
    run: list[Outputs],
    outputs: Sequence[str],
    expected: Sequence[Outputs],
    masks: Sequence[NDArray[np.bool_] | None],
) -> int:
    def error(number: int) -> float:
        got, right = run[number], expected[number]
        figures = [compare(got[name], right[name], name=name, mask=masks[number]) for name in outputs]
        return max(np.inf if np.isnan(entry.absolute) else entry.absolute for entry in figures)

    return max(range(len(run)), key=error)
