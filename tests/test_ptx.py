"""The CUDA kernels as nvcc compiles them, on the CPU: its PTX, interpreted (ptx.py), against the float64 reference.

The host side is the project's own, built by g++ (cuda_on_cpu.h); each of its launches runs the PTX. Beyond values it
holds bounds, alignment, data races, divergence, barriers, and reads of what nobody wrote. `python tests/test_ptx.py [75
80 90 120] [float32 float16 bfloat16]` runs more shapes, and orders of warps.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cuda_emulation import FILTERS, OK, SOURCES, Emulator, sizes_of, tensors_of

import ptx
from operators import CASES, TYPES, reference_of
from tolerances import assert_close

NVCC = shutil.which("nvcc") or next(iter(Path("/usr/local").glob("cuda*/bin/nvcc")), None)
ARCHITECTURES = [75, 80, 90, 120]
NAMES = ("base", "x", "A", "B", "tau", "C", "D")

ELSEWHERE = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
)

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc here")


class Device:
    """The PTX of one architecture behind the host side."""

    def __init__(self, architecture: int, folder: Path) -> None:
        out = folder / f"{architecture}.ptx"
        build = [NVCC, "-std=c++17", "-O3", "-ptx", f"-arch=compute_{architecture}", "-o", out]
        subprocess.run([*build, SOURCES / "kernels" / "cuda" / "loratrf_cuda.cu"], check=True, capture_output=True)
        self.kernels = ptx.Module(out.read_text()).kernels
        self.host = Emulator(folder / f"host-{architecture}.so", "-DLORATRF_MMA_ON_CPU")
        self.host.library.loratrf_kernel.restype = ctypes.c_char_p
        self.host.library.loratrf_kernel.argtypes = [ctypes.c_void_p]

    def run(
        self, tensors: dict[str, np.ndarray], sizes: tuple[int, ...], dtype: str, filter_input: str = "adapted",
        adapter_ids: Any = None, *, in_place: bool = False, offset: int = 0, policy: str = "all",
        multiprocessors: int = 2, refuse: bool = False,
    ) -> tuple[np.ndarray, list[tuple[str, int, dict]]]:  # fmt: skip
        """(y, [(kernel, blocks, stats)]) of a call, each tensor `offset` bytes behind a multiple of 256."""
        arrays = [tensors.get(name) for name in NAMES]
        held = sum(array.nbytes + 1024 for array in arrays if array is not None) + tensors["base"].nbytes
        memory = ptx.Memory(held + (1 << 20))
        addresses = (ctypes.c_void_p * 8)()
        for place, array in enumerate(arrays):
            if array is not None:
                readonly = place > 0 or not in_place
                addresses[place] = memory.alloc(array.nbytes, offset=offset, init=array.tobytes(), readonly=readonly)
        y = arrays[0]
        addresses[7] = addresses[0] if in_place else memory.alloc(y.nbytes, offset=offset)
        ids = None if adapter_ids is None else np.asarray(adapter_ids, np.int64)
        library, launches, faults = self.host.library, [], []
        self.host.gpu(multiprocessors, refuse_cooperative=refuse)

        def launch(kernel: int, grid: int, block: int, shared: int, parameter: int, together: int) -> None:
            try:
                name = library.loratrf_kernel(kernel).decode()
                program = self.kernels[name]
                values = ctypes.string_at(parameter, program.param_size)
                zeros = memory.alloc(256, init=bytes(256))
                launched = ptx.Launch(
                    program, memory, grid, block, shared, values, workspace=zeros if together else 0, policy=policy
                )
                launched.run()
                launches.append((name, grid, launched.stats))
            except ptx.Fault as fault:  # nothing goes up through the host side's frames
                faults.append(fault)

        def call(scratch: int, bytes_: Any) -> int:
            return library.loratrf_launch(
                list(TYPES).index(dtype), FILTERS[filter_input], (ctypes.c_int64 * 7)(*sizes),
                None if ids is None else ids.ctypes.data_as(ctypes.c_void_p), addresses, ctypes.c_void_p(scratch),
                ctypes.byref(bytes_), ELSEWHERE(launch),
            )  # fmt: skip

        wanted = ctypes.c_size_t(0)
        assert call(0, wanted) == OK
        assert call(memory.alloc(wanted.value or 16), wanted) == OK
        if faults:
            raise faults[0]
        assert all(stats["uninitialised"] == 0 and stats["low_bits"] == 0 for _, _, stats in launches), launches
        return np.frombuffer(memory.read(addresses[7], y.nbytes), y.dtype).reshape(y.shape), launches

    def check(
        self, op: str, T: int, K: int, N: int, R: int, F: int, dtype: str, filter_input: str = "adapted", **how: Any
    ) -> list[tuple[str, int, dict]]:
        """Holds a call against the reference; its launches."""
        tensors = tensors_of(op, T, K, N, R, F, dtype)
        y, launches = self.run(tensors, sizes_of(op, T, K, N, R, F), dtype, filter_input, **how)
        what = f"{op} {filter_input} T,K,N,R,F={(T, K, N, R, F)} {how}"
        assert_close(y, reference_of(op, tensors.values(), filter_input), dtype, what)
        return launches


def _slow(architecture: int) -> Any:
    return pytest.param(architecture, marks=[] if architecture == 80 else pytest.mark.slow)


@pytest.fixture(scope="module", params=map(_slow, ARCHITECTURES), ids="sm_{}".format)
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    return Device(request.param, tmp_path_factory.mktemp("ptx"))


def kernels_of(launches: list[tuple[str, int, dict]]) -> list[tuple[str, int]]:
    return [(kernel.split()[0], blocks) for kernel, blocks, _ in launches]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_tile_a_block(device: Device, dtype: str) -> None:
    for op, filter_input in CASES:
        launches = device.check(op, 17, 40, 99, 9, 3, dtype, filter_input, multiprocessors=1)
        assert kernels_of(launches) == [("Tiles", 2)]
    device.check("LoraTrf", 3, 24, 40, 8, 8, dtype, in_place=True, multiprocessors=1)


@pytest.mark.parametrize("dtype", TYPES)
def test_pieces_meet_at_the_grids_barriers(device: Device, dtype: str) -> None:
    for (op, filter_input), policy in zip(CASES, ["all", "block-first", "warp-last", "all"], strict=True):
        launches = device.check(op, 3, 300, 290, 8, 3, dtype, filter_input, policy=policy)
        assert kernels_of(launches) == [("Split", 2)]
    launches = device.check("LoraTrf", 1, 300, 290, 3, 8, dtype, refuse=True, in_place=True)
    assert kernels_of(launches) == [("Split", 2)] * 3


@pytest.mark.parametrize("dtype", TYPES)
def test_tensors_that_begin_anywhere(device: Device, dtype: str) -> None:
    device.check("LoraTrf", 5, 40, 48, 8, 8, dtype, offset=np.dtype(TYPES[dtype]).itemsize)


def test_each_row_has_its_slots_weights(device: Device) -> None:
    tensors = tensors_of("GroupedLoraTrf", (4, 3), 40, 56, 5, 9, "float16", slots=3)
    ids = [2, -1, 0, 2]
    y, _ = device.run(tensors, (4, 3, 40, 56, 5, 9, 3), "float16", "base", ids)
    assert_close(y, reference_of("GroupedLoraTrf", [*tensors.values(), np.array(ids)], "base"), "float16", "grouped")
    np.testing.assert_array_equal(y[1], tensors["base"][1])


def test_a_fault_is_found(device: Device) -> None:
    """The interpreter is no rubber stamp: without barriers it finds races, and addresses beyond a tensor."""
    tensors = tensors_of("LoraTrf", 3, 40, 48, 8, 8, "float32")
    sizes = sizes_of("LoraTrf", 3, 40, 48, 8, 8)
    with pytest.raises(ptx.Fault, match="out of bounds"):
        device.run(tensors | {"D": tensors["D"][:-1]}, sizes, "float32")
    kernels = device.kernels
    try:
        device.kernels = {name: without_barriers(program) for name, program in kernels.items() if "float" in name}
        with pytest.raises(ptx.Fault, match="race"):
            device.run(tensors, sizes, "float32")
    finally:
        device.kernels = kernels


def without_barriers(program: ptx.Program) -> ptx.Program:
    code = [
        line if not line[2].startswith("bar") else (None, False, "mov.u32", [REGISTER, REGISTER])
        for line in program.code
    ]
    return ptx.Program(program.name, program.kinds, code, program.labels, program.param_size)


REGISTER = "%r1"


def main(arguments: list[str]) -> None:
    """The whole matrix, of the architectures and types that are named, or all."""
    import tempfile

    architectures = [int(argument) for argument in arguments if argument.isdecimal()] or ARCHITECTURES
    types = [argument for argument in arguments if argument in TYPES] or list(TYPES)
    shapes = [(1, 1, 1, 1, 1), (3, 19, 99, 1, 19), (17, 130, 257, 8, 8), (17, 99, 40, 64, 33), (3, 272, 80, 256, 256)]
    with tempfile.TemporaryDirectory() as folder:
        for architecture in architectures:
            device, done = Device(architecture, Path(folder)), 0
            for dtype, (op, filter_input), shape in itertools.product(types, CASES, shapes):
                for how in (
                    {"multiprocessors": 1},
                    {"multiprocessors": 1, "in_place": True, "offset": np.dtype(TYPES[dtype]).itemsize},
                    *({"multiprocessors": 5, "policy": policy} for policy in ("all", "block-last", "warp-random")),
                    {"multiprocessors": 5, "refuse": True},
                ):
                    device.check(op, *shape, dtype, filter_input, **how)
                    done += 1
                print(f"sm_{architecture} {dtype} {op} {filter_input} {shape}: {done} calls right", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
