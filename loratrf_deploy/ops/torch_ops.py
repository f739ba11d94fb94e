"""The kernels as PyTorch operators: `torch.ops.loratrf.low_rank`, `.task_filter`, `.lora_trf`, `.grouped_lora_trf`.

Importing this module registers them, with fake kernels, so that torch.compile and torch.export pass through. They are
for inference: no gradient is defined. Letters: T tokens (any leading dimensions), K in-features, N out-features, R
rank, F filter rank; float32, float16 or bfloat16, one dtype for all tensors of a call, on the CPU or on one CUDA device
(ranks up to 256 there, queued on the current stream; adapter_ids stay on the CPU). Strided inputs are copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels

__all__ = ["grouped_lora_trf", "lora_trf", "low_rank", "task_filter"]


@torch.library.custom_op("loratrf::low_rank", mutates_args=(), device_types="cpu")
def low_rank(base: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """y = base + (x Aᵀ) Bᵀ

    base (T,N), x (T,K), A (R,K), B (N,R) with alpha/R already folded into B. Returns y (T,N), contiguous.
    Raises ValueError for shapes that don't fit or R over 1024, TypeError for other or mixed dtypes.
    """
    out = _like(base)
    kernels.run("LowRank", _ready(base, x, A, B), out, threads=torch.get_num_threads())
    return out


@torch.library.custom_op("loratrf::task_filter", mutates_args=(), device_types="cpu")
def task_filter(z: Tensor, tau: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y = z + ((s·z) Cᵀ) Dᵀ, s = clamp(⟨z,τ⟩ / (max(‖z‖,ε) · max(‖τ‖,ε)), 0, 1), ε = 1e-8

    z (T,N), tau (N), C (F,N), D (N,F) with gamma already folded into D. Returns y (T,N), contiguous.
    Raises ValueError for shapes that don't fit or F over 1024, TypeError for other or mixed dtypes.
    """
    out = _like(z)
    kernels.run("TaskFilter", _ready(z, tau, C, D), out, threads=torch.get_num_threads())
    return out


@torch.library.custom_op("loratrf::lora_trf", mutates_args=(), device_types="cpu")
def lora_trf(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, tau: Tensor, C: Tensor, D: Tensor, filter_input: str = "adapted"
) -> Tensor:
    """y = h + ((s·z) Cᵀ) Dᵀ, h = base + (x Aᵀ) Bᵀ, z = h for "adapted", base for "base", s as in `task_filter`

    Shapes as in `low_rank` and `task_filter`. Returns y (T,N), contiguous. Raises ValueError for shapes that don't fit,
    ranks over 1024 or another filter_input, TypeError for other or mixed dtypes.
    """
    out = _like(base)
    kernels.run("LoraTrf", _ready(base, x, A, B, tau, C, D), out, filter_input, threads=torch.get_num_threads())
    return out


@torch.library.custom_op("loratrf::grouped_lora_trf", mutates_args=(), device_types="cpu")
def grouped_lora_trf(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    tau: Tensor,
    C: Tensor,
    D: Tensor,
    adapter_ids: Tensor,
    filter_input: str = "adapted",
) -> Tensor:
    """y = lora_trf row by row, with the weights of slot adapter_ids[row]; base for id -1

    base (batch,...,N), x (batch,...,K), adapter_ids (batch) int64 in [-1, S), weights as in `lora_trf` with a leading S
    (slots); R or F may be 0. Returns y (batch,...,N), contiguous. Raises ValueError for shapes that don't fit, ids out
    of range, ranks over 1024 or another filter_input, TypeError for other or mixed dtypes.
    """
    out = _like(base)
    tensors = _ready(base, x, A, B, tau, C, D, adapter_ids)
    kernels.run("GroupedLoraTrf", tensors, out, filter_input, threads=torch.get_num_threads())
    return out


@low_rank.register_kernel("cuda")
def _(base: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return _on_cuda("LowRank", base, x, A, B)


@task_filter.register_kernel("cuda")
def _(z: Tensor, tau: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return _on_cuda("TaskFilter", z, tau, C, D)


@lora_trf.register_kernel("cuda")
def _(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, tau: Tensor, C: Tensor, D: Tensor, filter_input: str = "adapted"
) -> Tensor:
    return _on_cuda("LoraTrf", base, x, A, B, tau, C, D, filter_input=filter_input)


@grouped_lora_trf.register_kernel("cuda")
def _(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    tau: Tensor,
    C: Tensor,
    D: Tensor,
    adapter_ids: Tensor,
    filter_input: str = "adapted",
) -> Tensor:
    return _on_cuda("GroupedLoraTrf", base, x, A, B, tau, C, D, adapter_ids, filter_input=filter_input)


@low_rank.register_fake
def _(base: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return _like(base)


@task_filter.register_fake
def _(z: Tensor, tau: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return _like(z)


@lora_trf.register_fake
def _(
    base: Tensor, x: Tensor, A: Tensor, B: Tensor, tau: Tensor, C: Tensor, D: Tensor, filter_input: str = "adapted"
) -> Tensor:
    return _like(base)


@grouped_lora_trf.register_fake
def _(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    tau: Tensor,
    C: Tensor,
    D: Tensor,
    adapter_ids: Tensor,
    filter_input: str = "adapted",
) -> Tensor:
    return _like(base)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _ready(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().contiguous() for tensor in tensors]


def _on_cuda(op: str, *tensors: Tensor, filter_input: str = "adapted") -> Tensor:
    out = _like(tensors[0])
    with torch.cuda.device(out.device):
        kernels.run_on_cuda(
            op,
            _ready(*tensors),
            out,
            filter_input,
            stream=torch.cuda.current_stream().cuda_stream,
            allocate=lambda size: torch.empty(size, dtype=torch.uint8, device=out.device),
        )
    return out
