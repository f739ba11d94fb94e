"""How far a result may be from the float64 reference: one table by dtype, and the checks that read it."""

from __future__ import annotations

import numpy as np

TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Largest error as a share of the reference's largest magnitude."""

MANTISSA = {"float16": 10, "bfloat16": 7}
SMALLEST_EXPONENT = {"float16": -14, "bfloat16": -126}


def assert_close(actual, expected, dtype: str, what: str = "") -> None:
    """`actual` within the dtype's tolerance of `expected` (float64); prints the worst error as a share of it."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if not expected.size:
        return
    limit = TOLERANCE[dtype] * max(np.abs(expected).max(), 1e-30)
    share = np.abs(actual - expected).max() / limit
    print(f"{what} {dtype}: worst error is {share:.3f} of the tolerance")
    assert share < 1, f"{what} {dtype}: worst error is {share:.2f} times the tolerance"


def assert_rounded_once(actual, expected, dtype: str, what: str = "") -> None:
    """Half types: `actual` is `expected` (float64) rounded to nearest, bar rare values beside a rounding boundary."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    exponent = np.frexp(np.abs(expected))[1] - 1
    ulp = np.ldexp(1.0, np.maximum(exponent, SMALLEST_EXPONENT[dtype]) - MANTISSA[dtype])
    rounded = np.round(expected / ulp) * ulp
    # Float32 sums carry an error of their own, which shows in elements that cancel to nearly nothing.
    slack = 2e-6 * np.abs(expected).max()
    assert (np.abs(actual - expected) <= 0.5 * ulp + slack).all(), f"{what} {dtype}: rounded by more than half a unit"
    wrong = (actual != rounded).mean()
    assert wrong < 0.02, f"{what} {dtype}: {wrong:.1%} of the values are not the reference, rounded once"
