"""The fourth step of a parity check: from outputs on both sides to verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..pytorch.base import Outputs
from .case import Case
from .figures import Figures, compare, valid, worst
from .onnx_runs import NotComparable, OnnxRuns, Run
from .result import BASE_OFF, LIBRARY, NO_ADAPTER, Check, Status, Variant
from .torch_runs import TorchOutputs

__all__ = ["EFFECT", "Masks", "effect_checks", "judge", "over_batches", "parity_checks", "worst_batch"]

EFFECT = 10.0
"""The adapter has an effect where it changes an output by more than this many tolerances."""

Masks = Sequence[NDArray[np.bool_] | None]


def judge(case: Case, expected: TorchOutputs, runs: OnnxRuns) -> list[Check]:
    """Every variant within the tolerance or not, whether the adapter has an effect, and what the weights say."""
    outputs, masks, tolerance = case.outputs, case.masks, case.tolerance
    checks = [
        check
        for variant in LIBRARY
        for check in parity_checks(variant, runs.by_variant[variant], outputs, expected.on, masks, tolerance)
    ]
    checks += effect_checks(runs.outputs, outputs, expected.on, expected.off, masks, tolerance)
    checks += case.weight_checks
    if (run := runs.by_variant.get(NO_ADAPTER)) is not None:
        checks += parity_checks(NO_ADAPTER, run, outputs, expected.default, masks, tolerance)
    return checks


def parity_checks(
    variant: Variant,
    run: Run,
    outputs: Sequence[str],
    expected: Sequence[Outputs],
    masks: Masks,
    tolerance: float,
) -> list[Check]:
    """Whether each of `outputs` is within `tolerance` of what is `expected`, over all batches together."""
    if isinstance(run, UserError):
        status: Status = "skipped" if isinstance(run, NotComparable) else "failed"
        return [Check(variant, name, status, str(run)) for name in outputs]
    checks = []
    for name in outputs:
        figures = over_batches(run, expected, name, masks, tolerance)
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
    masks: Masks,
    tolerance: float,
) -> list[Check]:
    """Whether the export differs from PyTorch with the adapter's layers off by clearly more than the tolerance."""
    checks = []
    for name in outputs:
        exported = over_batches(run, base_off, name, masks, tolerance)
        true = over_batches(expected, base_off, name, masks, tolerance).relative
        status: Status = "passed"
        reason = ""
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
        checks.append(Check(BASE_OFF, name, status, reason, exported))
    return checks


def over_batches(
    run: Sequence[Outputs],
    expected: Sequence[Outputs],
    name: str,
    masks: Masks,
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


def worst_batch(run: Sequence[Outputs], outputs: Sequence[str], expected: Sequence[Outputs], masks: Masks) -> int:
    """The number of the batch with the largest absolute error."""

    def error(number: int) -> float:
        got, right = run[number], expected[number]
        figures = [compare(got[name], right[name], name=name, mask=masks[number]) for name in outputs]
        return max(np.inf if np.isnan(entry.absolute) else entry.absolute for entry in figures)

    return max(range(len(run)), key=error)
