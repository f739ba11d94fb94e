"""What a comparison found: the report's data, without any framework."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any, Literal, get_args

import numpy as np

from ..formats.manifest import ParitySummary
from ..version import __version__
from .figures import Figures

__all__ = [
    "BASE_OFF",
    "EVALUATED",
    "LIBRARY",
    "NO_ADAPTER",
    "QUANTISED",
    "VARIANTS",
    "WITHOUT_LIBRARY",
    "WITH_LIBRARY",
    "Check",
    "LayerError",
    "LayerTrace",
    "ParityReport",
    "Status",
    "Step",
    "Variant",
    "versions",
]

Step = Callable[[str], None]
"""Is told what is being done."""

Status = Literal["passed", "failed", "skipped", "no effect"]
STATUSES: tuple[Status, ...] = get_args(Status)

Variant = Literal["with library", "without library", "base-off", "quantised", "no adapter", "evaluated"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
WITH_LIBRARY, WITHOUT_LIBRARY, BASE_OFF, QUANTISED, NO_ADAPTER, EVALUATED = VARIANTS
LIBRARY: dict[Variant, bool] = {WITH_LIBRARY: True, WITHOUT_LIBRARY: False}
"""The comparisons with PyTorch that every model has, and whether they register the custom-op library."""


@dataclass(frozen=True)
class Check:
    """One comparison of one output. The status "no effect" is a finding, see `reason`.

    "with library" and "without library" hold ONNX Runtime against PyTorch with the adapter. "base-off" holds the export
    against PyTorch without the adapter's layers, where a large error is what passes. "quantised" holds a quantised
    base's weights against its own, in steps of the quantisation, and an encoder's answers in int8 against PyTorch's.
    "no adapter" holds a swappable export that is given no adapter against what its default is: PyTorch's base or the
    adapter. "evaluated" is what a user's own rows say of the export beside PyTorch in float32: figures, and no failure.
    """

    variant: Variant
    output: str
    status: Status
    reason: str = ""
    figures: Figures | None = None


@dataclass(frozen=True)
class LayerError:
    """relative = max|a-b| / max|b| of one module's output, in execution order; `op` is the ONNX operator behind it."""

    module: str
    op: str
    relative: float
    absolute: float
    drifts: bool


@dataclass(frozen=True)
class LayerTrace:
    """Errors of the layers under one variant, in the graph's order, outputs last; how many were skipped, and why."""

    variant: Variant
    layers: tuple[LayerError, ...] = ()
    skipped: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ParityReport:
    """What was compared and what came out. `layers` follow the graph's order, outputs last; `inputs` are shapes."""

    model: str
    adapter: str
    dtype: str
    tolerance: float
    checks: tuple[Check, ...]
    layers: tuple[LayerError, ...]
    layers_variant: Variant
    layers_skipped: int
    inputs: tuple[dict[str, tuple[int, ...]], ...]
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    layers_reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing failed and at least one comparison with PyTorch passed: skipped is not passed."""
        statuses = [check.status for check in self.checks]
        return "failed" not in statuses and any(
            check.status == "passed" and check.variant in LIBRARY for check in self.checks
        )

    @property
    def first_drift(self) -> LayerError | None:
        """The first layer, in execution order, whose error exceeds the tolerance; None where parity holds."""
        return None if self.passed else next((layer for layer in self.layers if layer.drifts), None)

    @property
    def counts(self) -> dict[Status, int]:
        """Number of checks by status; every status is there."""
        counts = dict.fromkeys(STATUSES, 0)
        for check in self.checks:
            counts[check.status] += 1
        return counts

    @property
    def verdict(self) -> str:
        """One sentence: what came out, and where the fault begins."""
        counts = self.counts
        parts = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        if self.passed:
            return f"Parity holds ({parts})."
        drift = self.first_drift
        if drift is not None:
            return (
                f"Parity failed ({parts}). The first layer that drifts is {drift.module} ({drift.op}): relative error "
                f"{drift.relative:.2e}, tolerance {self.tolerance:g}."
            )
        if counts["failed"]:
            return f"Parity failed ({parts}). No layer drifts on its own: see the reasons of the failed checks."
        return f"Parity is not proven ({parts}): no comparison could be run."

    def summary(self) -> ParitySummary:
        """The figures that an export's manifest keeps: verdict, tolerance and one row per check; JSON-ready."""
        return ParitySummary(self.passed, self.tolerance, len(self.inputs), tuple(map(_check_dict, self.checks)))

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-ready: non-finite numbers become strings ("inf", "nan"), which JSON has no numbers for."""
        values = asdict(self) | {
            "passed": self.passed,
            "verdict": self.verdict,
            "counts": self.counts,
            "first_drift": self.first_drift and self.first_drift.module,
            "checks": [_check_dict(check) for check in self.checks],
        }
        return _jsonable(values)


def _check_dict(check: Check) -> dict[str, Any]:
    values: dict[str, Any] = {"variant": check.variant, "output": check.output, "status": check.status}
    if check.reason:
        values["reason"] = check.reason
    if check.figures is not None:
        values |= asdict(check.figures)
    return _jsonable(values)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(entry) for entry in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def versions() -> dict[str, str]:
    """Of the packages that a comparison was made with, and of Python."""
    packages = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "peft")
    versions = {"loratrf-deploy": __version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"python": platform.python_version(), "machine": platform.machine()}
