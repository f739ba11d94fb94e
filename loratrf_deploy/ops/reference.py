"""What each operator means, in numpy: the oracle that kernels, function bodies and torch layers are tested against.

Letters: T tokens (any number of leading dimensions), K in-features, N out-features, R rank, F filter rank, S adapter
slots. Inputs of any float dtype are widened to float64 and nothing is rounded on the way; a kernel rounds once, when it
stores y, so a test rounds this result to the kernel's dtype and compares. Source: LoRATRF, arXiv 2412.09827; the
filter's form follows TOAST, arXiv 2305.15542.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["EPSILON", "filter_score", "grouped_lora_trf", "lora_trf", "low_rank", "task_filter"]

EPSILON = 1e-8
"""Smallest norm that the filter divides by (PyTorch's cosine_similarity has the same default)."""

Array = NDArray[np.float64]


def low_rank(base: NDArray, x: NDArray, A: NDArray, B: NDArray) -> Array:
    """y = base + (x Aᵀ) Bᵀ

    base (T,N), x (T,K), A (R,K), B (N,R) with alpha/R already folded into B. Returns y (T,N), float64.
    """
    base, x, A, B = (_widen(value) for value in (base, x, A, B))
    return base + (x @ A.T) @ B.T


def filter_score(z: NDArray, tau: NDArray) -> Array:
    """s = clamp(⟨z,τ⟩ / (max(‖z‖,ε) · max(‖τ‖,ε)), 0, 1)

    z (T,N), tau (N). Returns s (T,1), float64: 0 for a token that points away from the task vector, 1 for one along it.
    """
    z, tau = _widen(z), _widen(tau)
    norms = np.maximum(np.linalg.norm(z, axis=-1, keepdims=True), EPSILON) * max(float(np.linalg.norm(tau)), EPSILON)
    return np.clip((z @ tau)[..., None] / norms, 0.0, 1.0)


def task_filter(z: NDArray, tau: NDArray, C: NDArray, D: NDArray) -> Array:
    """y = z + ((s·z) Cᵀ) Dᵀ, s = filter_score(z, τ)

    z (T,N), tau (N), C (F,N), D (N,F) with gamma already folded into D. Returns y (T,N), float64.
    """
    z, C, D = _widen(z), _widen(C), _widen(D)
    return z + ((filter_score(z, tau) * z) @ C.T) @ D.T


def lora_trf(
    base: NDArray,
    x: NDArray,
    A: NDArray,
    B: NDArray,
    tau: NDArray,
    C: NDArray,
    D: NDArray,
    filter_input: str = "adapted",
) -> Array:
    """y = h + ((s·z) Cᵀ) Dᵀ, h = base + (x Aᵀ) Bᵀ, z = h if filter_input == "adapted" else base, s = filter_score(z, τ)

    Shapes as in `low_rank` and `task_filter`. Returns y (T,N), float64. Raises ValueError for another filter_input.
    """
    if filter_input not in ("adapted", "base"):
        raise ValueError(f'filter_input is {filter_input!r}, expected "adapted" or "base"')
    h = low_rank(base, x, A, B)
    z = h if filter_input == "adapted" else _widen(base)
    return h + task_filter(z, tau, C, D) - z


def grouped_lora_trf(
    base: NDArray,
    x: NDArray,
    A: NDArray,
    B: NDArray,
    tau: NDArray,
    C: NDArray,
    D: NDArray,
    adapter_ids: NDArray,
    filter_input: str = "adapted",
) -> Array:
    """y[row] = lora_trf(base[row], x[row], A[id], B[id], tau[id], C[id], D[id]), id = adapter_ids[row]; base for -1

    base (batch,...,N), x (batch,...,K), adapter_ids (batch) integers in [-1, S), weights as in `lora_trf` with a
    leading S; R or F may be 0. Returns y (batch,...,N), float64. Raises IndexError for an id out of range.
    """
    y = _widen(base).copy()
    for row, slot in enumerate(adapter_ids):
        if not -1 <= slot < len(A):
            raise IndexError(f"adapter_ids[{row}] is {slot}, expected -1 to {len(A) - 1}")
        if slot >= 0:
            y[row] = lora_trf(base[row], x[row], A[slot], B[slot], tau[slot], C[slot], D[slot], filter_input)
    return y


def _widen(value: NDArray) -> Array:
    return np.asarray(value).astype(np.float64)
