"""Several adapters as one, each with a share: y = h + Σᵢ wᵢ·(x Aᵢᵀ)Bᵢᵀ, exact for plain LoRA. numpy alone.

The ranks of the parts stand side by side: A is [A₁; A₂; ...] (ΣR,K), B is [w₁·B₁, w₂·B₂, ...] (N,ΣR).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, some
from ..ops.schemas import MAX_CUDA_RANK, MAX_RANK, Device
from .swappable import RuntimeWeight, neutral

__all__ = ["Blend", "blend"]


@dataclass(frozen=True)
class Blend:
    """Which adapters with which weights, by name: equal for equal dictionaries, and can be a key of one."""

    parts: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, weights: Mapping[str, float]) -> Blend:
        """The blend of {name: weight}; weights of any sign and sum. UserError if empty, or a weight isn't finite."""
        shown = reprlib.repr  # of a value of any kind and size
        wrong = [f"{shown(name)}: {shown(weight)}" for name, weight in weights.items() if not _is_part(name, weight)]
        if wrong or not weights:
            raise UserError(
                f"The blend has {some(wrong) or 'no adapters'}. Expected names of loaded adapters with finite numbers, "
                'such as {"fr": 0.7, "legal": 0.3}.'
            )
        return cls(tuple(sorted((name, float(weight)) for name, weight in weights.items())))

    def times(self, scale: float) -> Blend:
        """Every weight times `scale`."""
        return Blend(tuple((name, weight * scale) for name, weight in self.parts))

    def __str__(self) -> str:
        return "{" + some([f"{name!r}: {weight:g}" for name, weight in self.parts]) + "}"


def blend(
    wanted: Blend,
    adapters: Mapping[str, Mapping[str, NDArray[Any]]],
    weights: Sequence[RuntimeWeight],
    device: Device = "cpu",
) -> dict[str, NDArray[Any]]:
    """Graph input -> value for every one of `weights`: A (ΣR,K) and B (N,ΣR) per layer, zeros where no part has any.

    `adapters` holds by name what the parts' .onnx_adapter files hold, with alpha/R in B already. Types stay: B is
    scaled in float32 and rounded once. Saved modules are the parts' common ones. The result owns its memory. One
    adapter alone keeps its filters, gamma times its weight, and at a weight of 1 the gains of a DoRA. Raises UserError
    for several parts of which one has filters (D not all zero), parts whose saved modules differ, other blends with a
    DoRA, a rank over what the operators take on `device`, and values that exceed the type.
    """
    parts = [(name, adapters[name], share) for name, share in wanted.parts]
    _check_parts(wanted, parts, weights)
    most = MAX_CUDA_RANK if device == "cuda" else MAX_RANK
    # Of saved modules, all parts bring the same.
    values = {
        weight.name: neutral(weight) if weight.in_layer else parts[0][1][weight.name].copy() for weight in weights
    }
    A_of = {weight.module: weight.name for weight in weights if weight.part == "A"}
    for weight in weights:
        if weight.part != "B":
            continue
        A, B = _side_by_side([(held[A_of[weight.module]], held[weight.name], share) for _, held, share in parts])
        if len(A) > most:
            raise UserError(
                f"The blend {wanted} has the rank {len(A)} at {weight.module}, more than {most}, which is what the "
                f"operators take on {device}: the ranks of its adapters add up. Blend fewer, or of lower rank."
            )
        _check_finite(wanted, weight, B)
        if len(A):
            values[A_of[weight.module]], values[weight.name] = A, B
    if len(parts) == 1:
        _, held, share = parts[0]
        for weight in weights:
            if weight.part in ("gain", "offset"):
                values[weight.name] = held[weight.name].copy()
            elif weight.part in ("tau", "C", "D"):
                values[weight.name] = _scaled_filter(weight, held[weight.name], share)
                _check_finite(wanted, weight, values[weight.name])
    return values


def _is_part(name: object, weight: object) -> bool:
    if not isinstance(name, str) or not isinstance(weight, Real) or isinstance(weight, bool):
        return False
    try:
        return math.isfinite(weight)
    except OverflowError:  # an integer beyond any float
        return False


def _check_parts(
    wanted: Blend, parts: Sequence[tuple[str, Mapping[str, NDArray[Any]], float]], weights: Sequence[RuntimeWeight]
) -> None:
    D = [weight.name for weight in weights if weight.part == "D"]
    filters = [repr(name) for name, held, _ in parts if any(held[entry].any() for entry in D)]
    if filters and len(parts) > 1:
        raise UserError(
            f"The blend {wanted} can't be made: {some(filters)} brings filters. Filters don't add: what one lets "
            "through depends on the layer's whole output. Blend plain LoRA adapters, or name one adapter."
        )
    scaled = [
        repr(name)
        for name, held, _ in parts
        if any(not np.array_equal(held[weight.name], neutral(weight)) for weight in weights if weight.part == "gain")
    ]
    if scaled and [share for _, _, share in parts] != [1]:
        raise UserError(
            f"The blend {wanted} can't be made: {some(scaled)} is a DoRA, whose gains rescale the base's outputs and "
            "don't add. Blend plain LoRA adapters, or name one adapter."
        )
    heads = [
        weight.name
        for weight in weights
        if not weight.in_layer
        and any(not np.array_equal(held[weight.name], parts[0][1][weight.name]) for _, held, _ in parts)
    ]
    if heads:
        raise UserError(
            f"The blend {wanted} can't be made: its adapters bring different values for {some(heads)}. A head is saved "
            "whole, it is no low-rank change that could be added to another. Train adapters that share one head, or "
            "name one adapter."
        )


def _scaled_filter(weight: RuntimeWeight, value: NDArray[Any], share: float) -> NDArray[Any]:
    """One adapter alone keeps its filters, gamma times its weight: out = y + w·gamma·((s·z) Cᵀ)Dᵀ."""
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found by `blend`
        return (value.astype(np.float32) * np.float32(share if weight.part == "D" else 1)).astype(value.dtype)


def _check_finite(wanted: Blend, weight: RuntimeWeight, value: NDArray[Any]) -> None:
    if not np.isfinite(value).all():
        raise UserError(
            f"The blend {wanted} exceeds {weight.dtype}, which the model computes in, at {weight.name}. Take smaller "
            "weights."
        )


def _side_by_side(
    parts: Sequence[tuple[NDArray[Any], NDArray[Any], float]],
) -> tuple[NDArray[Any], NDArray[Any]]:
    """A (ΣR,K) and B (N,ΣR) of parts (A, B, weight).

    Ranks whose column of B is zero add nothing and are left out: halves that an adapter lacks, padding, a weight of 0.
    """
    left, right = [], []
    for A, B, share in parts:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is found by `blend`
            scaled = (B.astype(np.float32) * np.float32(share)).astype(B.dtype)
        used = scaled.any(axis=0)
        left.append(A[used])
        right.append(scaled[:, used])
    # Columns that were picked lie in memory as rows; ONNX Runtime reads B row by row.
    return np.concatenate(left), np.ascontiguousarray(np.concatenate(right, axis=1))
