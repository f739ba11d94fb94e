"""The compiled operators on numpy arrays and torch tensors, each into an `out` of the first input's shape.

Calls the custom-op library's C functions (csrc/c_api.cc) through ctypes, without the GIL and without torch or ONNX
Runtime; `torch_ops` makes PyTorch operators of them. `out` may be the first input. Letters, shapes and formulas are
those of `reference`; float32, float16 or bfloat16, one dtype for all tensors of a call. Raises ValueError for shapes
that don't fit, TypeError for dtypes and devices that don't.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .library import library_path

__all__ = ["MAX_CUDA_RANK", "MAX_RANK", "OPS", "isa", "isas", "run", "run_on_cuda", "set_isa"]

_library = ctypes.CDLL(str(library_path()))
for _name in ("message", "operators", "isa"):
    getattr(_library, f"loratrf_{_name}").restype = ctypes.c_char_p
_library.loratrf_max_rank.restype = ctypes.c_int64

OPS: dict[str, tuple[str, ...]] = {
    line.split()[0]: tuple(line.split()[1:]) for line in _library.loratrf_operators().decode().splitlines()
}
"""Inputs by operator, as the library has them."""
MAX_RANK: int = _library.loratrf_max_rank(0)
MAX_CUDA_RANK: int = _library.loratrf_max_rank(1)
"""0 in a build without CUDA."""

_INDEX = {name: i for i, name in enumerate(OPS)}
_TYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int64": 3}
_IDS = 3
_FLOATS = "float32, float16 or bfloat16"
# csrc/kernels/loratrf.h's Status; the others are ValueErrors.
_EXCEPTIONS: dict[int, type[Exception]] = {4: MemoryError, 6: RuntimeError}

_forced_isa = b""
_seen: dict[Any, int | None] = {}
"""_TYPES by numpy's and torch's own dtype objects, whose names take long to make."""


def run(
    op: str, inputs: Sequence[Any], out: Any, filter_input: str = "adapted", *, threads: int = 0, prepack: bool = False
) -> None:
    """Computes the ONNX operator `op` on CPU tensors, `inputs` in the order of OPS[op].

    threads=0 takes all of the machine's; prepack packs the weights first, as a session does with constant ones.
    """
    arguments = _arguments(op, inputs, out, filter_input, "cpu")
    _check(_library.loratrf_run(*arguments, _forced_isa, threads, prepack))


def run_on_cuda(
    op: str,
    inputs: Sequence[Any],
    out: Any,
    filter_input: str = "adapted",
    *,
    stream: int,
    allocate: Callable[[int], Any],
) -> None:
    """Queues `op` on CUDA tensors of the current device; adapter_ids are on the CPU.

    stream: a cudaStream_t as a number. allocate(bytes) returns a tensor on the device, which may go back, in the
    stream's order, when this returns.
    """
    arguments = _arguments(op, inputs, out, filter_input, "cuda")
    if not MAX_CUDA_RANK:
        raise RuntimeError(
            "loratrf_deploy was built without CUDA. Put nvcc on the PATH and build it from its source again: "
            "`CMAKE_ARGS=-DLORATRF_CUDA=ON pip install .`"
        )
    size = ctypes.c_size_t(0)
    scratch: Any = None
    for _ in range(2):
        address = ctypes.c_void_p(scratch.data_ptr() if scratch is not None else None)
        _check(_library.loratrf_run_on_cuda(*arguments, address, ctypes.c_void_p(stream), ctypes.byref(size)))
        if scratch is not None or not size.value:
            return
        scratch = allocate(size.value)


def isa() -> str:
    """Name of the instruction set in use."""
    name: bytes | None = _library.loratrf_isa(_forced_isa)
    if name is None:
        raise ValueError(_library.loratrf_message().decode())
    return name.decode()


def isas() -> list[str]:
    """Names of the instruction sets that this build has and this CPU can run."""
    return [name for name in ("baseline", "avx2", "avx512", "lanes16") if _library.loratrf_isa(name.encode())]


def set_isa(name: str) -> None:
    """Forces an instruction set on this module's calls; "" goes back to LORATRF_ISA or the best one."""
    global _forced_isa
    if name and name not in isas():
        raise ValueError(f'Instruction set "{name}" is not in this build or not in this CPU.')
    _forced_isa = name.encode()


def _check(status: int) -> None:
    if status:
        raise _EXCEPTIONS.get(status, ValueError)(_library.loratrf_message().decode())


def _arguments(op: str, inputs: Sequence[Any], out: Any, filter_input: str, device: str) -> tuple[Any, ...]:
    """What the C functions begin with: operator, type, tensors, filter_input. Checks dtypes, devices and strides."""
    if len(inputs) != len(OPS.get(op, ())):
        raise ValueError(f"No operator {op} of {len(inputs)} inputs.")
    numbers: list[int] = []
    names = OPS[op]
    first: Any = None  # the first input's type
    place: Any = None  # and its device's number
    for name, tensor in zip((*names, "out"), (*inputs, out), strict=True):
        ids = name == "adapter_ids"
        where = "cpu" if ids else device
        if isinstance(tensor, np.ndarray) and where == "cpu":
            address, contiguous = tensor.__array_interface__["data"][0], tensor.flags.c_contiguous
            if name == "out" and not tensor.flags.writeable:
                raise ValueError("out is read-only, expected an array to write to.")
        elif hasattr(tensor, "data_ptr"):
            if tensor.device.type != where:
                raise TypeError(f"{name} is on device {tensor.device.type}, expected a {where.upper()} tensor.")
            address, contiguous = tensor.data_ptr(), tensor.is_contiguous()
            if where == "cuda":
                index = tensor.device.index
                place = index if place is None else place
                if index != place:
                    expected = f"all tensors on device {place}, where {names[0]} is"
                    raise TypeError(f"{name} is on device {index}, expected {expected}.")
        else:
            what = "a numpy array or a torch tensor" if where == "cpu" else "a CUDA tensor"
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected {what}.")
        dtype = tensor.dtype
        kind = _seen[dtype] if dtype in _seen else _seen.setdefault(dtype, _TYPES.get(str(dtype).split(".")[-1]))
        if kind is None or (kind == _IDS) != ids:
            raise TypeError(f"{name} is of dtype {dtype}, expected {'int64' if ids else _FLOATS}.")
        first = kind if first is None else first
        if kind != first and not ids:
            raise TypeError(f"{name} is of another dtype than {names[0]}, expected one dtype for all tensors.")
        if not contiguous:
            raise ValueError(f"{name} is strided, expected it C-contiguous: pass a contiguous copy.")
        shape = tensor.shape
        numbers += (address, len(shape), *shape)
    packed = (ctypes.c_int64 * len(numbers))(*numbers)
    return _INDEX[op], first, packed, filter_input.encode()
