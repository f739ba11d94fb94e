"""An encoder's int8 products, as they are in the file: each held against its formula, and what they cost the answers.

The other comparisons are of a graph that multiplies in float32, since no PyTorch model says what rounding is to give:
where two runs differ by the last bit, a value between two steps goes up in one and down in the other, and on it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..pytorch.base import Inputs, Outputs
from .case import load_graph
from .checks import Masks, over_batches
from .figures import relative_error
from .onnx_runs import run_batches, run_session, session_in_memory
from .quantised import WEIGHTS_OF, Product, products
from .result import QUANTISED, Check

__all__ = ["rounding_checks"]

_TOLERANCE = 1e-5
_NAMED = 3


def rounding_checks(
    model: Path,
    batches: Sequence[Inputs],
    outputs: Sequence[str],
    against: Callable[[list[Outputs], str], tuple[Sequence[Outputs], Sequence[Outputs], Masks]],
    weights: Mapping[str, NDArray[Any]] | None,
    *,
    library: bool,
) -> list[Check]:
    """A check of the products in the file `model`, one of each of `outputs`: what rounding changed of it.

    `against` is told what the model gave, and an output's name, and says what is to be compared with what, and where.
    None where the file has no product in int8. What rounding costs is a figure, and no failure.
    """
    graph = load_graph(model)
    if not (found := products(graph)):
        return []
    run = run_batches(model, batches, outputs, library, weights=weights)
    if isinstance(run, UserError):
        return [Check(QUANTISED, name, "failed", str(run)) for name in outputs]
    checks = [_check_products(graph, found, model, batches[0], weights, library=library)]
    for name in outputs:
        got, exact, masks = against(run, name)
        figures = over_batches(got, exact, name, masks, 0.0)
        finite = np.isfinite(figures.relative)
        reason = f"rounding tokens to int8 changes it by {figures.relative:.1e}" if finite else "NaN or Inf in int8"
        if changed := figures.flips + figures.ties:
            reason += f", and {changed} of {figures.choices} top-1 answers"
        checks.append(Check(QUANTISED, name, "passed" if finite else "failed", reason, figures))
    return checks


def _check_products(
    graph: Any,
    found: Sequence[Product],
    model: Path,
    batch: Inputs,
    weights: Mapping[str, NDArray[Any]] | None,
    *,
    library: bool,
) -> Check:
    """Whether each product is s·w·(round(x/s) Q) of its own x, s = max|x|/127 of each token, summed in float64."""
    present = {value.name for value in graph.graph.outputs}
    wanted = {value.name: value for product in found for value in (product.x, product.y) if value.name not in present}
    graph.graph.outputs.extend(wanted.values())
    got = run_session(session_in_memory(graph, model, library=library), batch, weights=weights)
    worst, where, costs = 0.0, "", dict[str, float]()
    for product in found:
        x, y = got[str(product.x.name)], got[str(product.y.name)]
        s = np.maximum(np.abs(x).max(-1, keepdims=True), np.finfo(np.float32).tiny) / np.float32(127)
        assert product.values.const_value is not None
        assert product.scales.const_value is not None
        weight = product.values.const_value.numpy().astype(np.float64) * product.scales.const_value.numpy()
        error, _ = relative_error(y, np.round(x / s) * s.astype(np.float64) @ weight)
        name = product.last.metadata_props.get("module") or product.last.metadata_props[WEIGHTS_OF]
        if not error <= worst:
            worst, where = error, name
        costs[name], _ = relative_error(y, x.astype(np.float64) @ weight)
    if not worst <= _TOLERANCE:
        reason = f"int8 products are within {worst:.1e} of their formula, expected {_TOLERANCE:g} (worst: {where})"
        return Check(QUANTISED, "products", "failed", reason)
    most = sorted(costs, key=lambda name: -costs[name])[:_NAMED]
    reason = f"{len(found)} int8 products are within {worst:.1e} of their formula; rounding their tokens costs most in "
    return Check(QUANTISED, "products", "passed", reason + ", ".join(f"{name} ({costs[name]:.1e})" for name in most))
