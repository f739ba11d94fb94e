"""The CUDA kernels on a CPU, a fiber for each thread (tests/cuda_on_cpu.h), against the float64 reference.

Proves indices, masks, reductions, barriers and launch plans, and what the custom-op library does with its scratch and
errors in ONNX Runtime; what only a GPU shows is in test_cuda.py.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
from pathlib import Path

import numpy as np
import pytest

from operators import (
    CASES,
    TYPES,
    WEIGHTS,
    attributes_of,
    expected_of,
    model_of,
    reference_of,
    run,
    session_of,
    values_of,
)  # fmt: skip
from tolerances import assert_close

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"
FILTERS = {"adapted": 0, "base": 1}
OK, BAD_SIZE, RANK_TOO_HIGH, NULL_POINTER, _, BAD_ADAPTER_ID, DEVICE, _ = range(8)  # Status in csrc/kernels/loratrf.h


class Emulator:
    """One build of the kernels for the CPU, on a pretended GPU."""

    def __init__(self, path: Path, *flags: str) -> None:
        warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        build = ["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", *warnings, "-o", path]
        # The pretended GPU's state is the process's, and ONNX Runtime closes libraries.
        build += ["-Wl,-z,nodelete", "-include", TESTS / "cuda_on_cpu.h", TESTS / "cuda_emulation.cc", *flags]
        subprocess.run(build, check=True)
        self.library = ctypes.CDLL(str(path))
        self.fault = ""
        self.bad_row = -1

    def gpu(self, multiprocessors=2, backwards=False, refuse_cooperative=False, error=0) -> int:
        """Sets the pretended GPU; returns the launches since the last call."""
        return self.library.loratrf_emulate_gpu(multiprocessors, backwards, refuse_cooperative, error)

    def devices(self, current=0, tensors=0) -> tuple[int, ...]:
        """Sets the current device and the tensors'; (current, the last launch's, asked, loaded) since the last call."""
        state = (ctypes.c_int * 4)()
        self.library.loratrf_emulate_devices(current, tensors, state)
        return tuple(state)

    def run(self, tensors, sizes, dtype, filter_input="adapted", adapter_ids=None, in_place=False):
        """(status, y) of a call on {name: array}; sizes: batch, tokens of a row, K, N, R, F, S."""
        arrays = [tensors.get(name) for name in ("base", "x", "A", "B", "tau", "C", "D")]
        y = np.full_like(arrays[0], np.nan)
        arrays.append(y)
        pointers = (ctypes.c_void_p * 8)(*(None if a is None else a.ctypes.data for a in arrays))
        bytes_ = (ctypes.c_int64 * 8)(*(0 if a is None else a.nbytes for a in arrays))
        ids = None if adapter_ids is None else np.asarray(adapter_ids, np.int64)
        row, message = ctypes.c_int64(-1), ctypes.c_char_p(b"")
        status = self.library.loratrf_emulate(
            list(TYPES).index(dtype),
            FILTERS[filter_input],
            (ctypes.c_int64 * 7)(*sizes),
            None if ids is None else ids.ctypes.data_as(ctypes.c_void_p),
            pointers,
            bytes_,
            int(in_place),
            ctypes.byref(row),
            ctypes.byref(message),
        )
        self.bad_row, self.fault = row.value, (message.value or b"").decode()
        return status, y


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    made = Emulator(tmp_path_factory.mktemp("cuda") / "emulation.so", "-DLORATRF_MMA_ON_CPU")
    made.gpu()
    return made


@pytest.fixture(scope="module")
def shuffles(tmp_path_factory):
    return Emulator(tmp_path_factory.mktemp("cuda") / "shuffles.so")


@pytest.fixture(autouse=True)
def _usual_gpu(request):
    if "emulator" in request.fixturenames:
        request.getfixturevalue("emulator").gpu()


def tensors_of(op, T, K, N, R, F, dtype, slots=1):
    """{name: array} of a call. With slots: (batch, tokens) for T."""
    values = values_of(op, T, K, N, R, F, S=slots).items()
    return {"base" if name == "z" else name: v.astype(TYPES[dtype]) for name, v in values if name != "adapter_ids"}


def sizes_of(op, T, K, N, R, F):
    """Of a call for one adapter, without those that the operator lacks."""
    return (1, T, 0 if op == "TaskFilter" else K, N, 0 if op == "TaskFilter" else R, 0 if op == "LowRank" else F, 1)


def check(emulator, op, T, K, N, R, F, dtype, filter_input="adapted", **options):
    tensors = tensors_of(op, T, K, N, R, F, dtype)
    status, y = emulator.run(tensors, sizes_of(op, T, K, N, R, F), dtype, filter_input, **options)
    what = f"{op} {filter_input} T,K,N,R,F={(T, K, N, R, F)}"
    assert status == OK, what
    assert_close(y, reference_of(op, tensors.values(), filter_input), dtype, what)


def test_long_sums_of_float32_are_rounded_not_cut_off(emulator):
    # All terms are positive: what a tensor core cuts off would add up.
    T, K, N, R = 3, 65536, 16, 2
    rng = np.random.default_rng(0)
    shapes = {"x": (T, K), "A": (R, K), "B": (N, R)}
    tensors = {name: rng.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {"base": np.zeros((T, N), np.float32), **tensors}
    status, y = emulator.run(tensors, (1, T, K, N, R, 0, 1), "float32")
    assert status == OK
    assert np.abs(y / reference_of("LowRank", tensors.values()) - 1).max() < 1e-6


# (T, K, N, R, F): one tile to several, widths that are and aren't whole chunks and 16 bytes, every rank's remainder.
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 19, 99, 1, 19),
    (16, 130, 257, 8, 8),
    (17, 64, 96, 19, 1),
    (17, 99, 40, 64, 33),
    (130, 24, 50, 8, 19),
    (3, 272, 80, 256, 256),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("op", "filter_input"), CASES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_tiles(emulator, dtype, op, filter_input, sizes):
    emulator.gpu(multiprocessors=1)  # too few blocks to cut a tile's columns into pieces
    check(emulator, op, *sizes, dtype, filter_input)
    check(emulator, op, *sizes, dtype, filter_input, in_place=True)
    assert emulator.gpu() == 2


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("op", "filter_input"), CASES)
@pytest.mark.parametrize("multiprocessors", [3, 5])
def test_pieces_meet_in_one_launch(emulator, dtype, op, filter_input, multiprocessors):
    for sizes in [(1, 600, 600, 19, 8), (16, 1030, 257, 8, 19), (17, 64, 989, 64, 33), (3, 272, 400, 256, 256)]:
        for backwards in (False, True):
            emulator.gpu(multiprocessors, backwards)
            check(emulator, op, *sizes, dtype, filter_input)
            check(emulator, op, *sizes, dtype, filter_input, in_place=True)
            assert emulator.gpu() == 2


@pytest.mark.parametrize(("op", "filter_input"), CASES)
def test_a_refused_cooperative_launch_becomes_one_for_each_step(emulator, op, filter_input):
    emulator.gpu(5, refuse_cooperative=True)
    check(emulator, op, 17, 600, 989, 19, 8, "float16", filter_input)
    assert emulator.gpu() == (3 if op == "LoraTrf" else 2)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize(("op", "filter_input"), CASES)
def test_any_order_of_warps_gives_the_same_bits(emulator, op, filter_input, backwards):
    tensors = tensors_of(op, 33, 300, 300, 19, 40, "float32")
    sizes = sizes_of(op, 33, 300, 300, 19, 40)
    results = []
    for order in (False, backwards):
        emulator.gpu(1, order)
        results.append(emulator.run(tensors, sizes, "float32", filter_input)[1])
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("dtype", TYPES)
def test_before_sm_80_shuffles_stand_in_for_tensor_cores(shuffles, dtype):
    for op, filter_input in CASES:
        shuffles.gpu(3)
        check(shuffles, op, 17, 99, 200, 19, 8, dtype, filter_input)


@pytest.mark.parametrize("multiprocessors", [1, 8])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("filter_input", FILTERS)
def test_grouped(emulator, dtype, filter_input, multiprocessors):
    # Rows of one tile and of two, slots in any order, base alone, slots that no row names.
    for batch, tokens, K, N, R, F, ids in [
        (5, 17, 40, 99, 8, 19, [2, -1, 0, 2, -1]),
        (2, 1, 300, 600, 19, 8, [1, 0]),
        (3, 4, 19, 64, 0, 5, [0, 2, -1]),
        (3, 4, 19, 64, 5, 0, [0, 2, -1]),
        (2, 3, 19, 64, 0, 0, [0, 1]),
        (2, 3, 19, 64, 4, 4, [-1, -1]),
    ]:
        emulator.gpu(multiprocessors)
        tensors = tensors_of("GroupedLoraTrf", (batch, tokens), K, N, R, F, dtype, slots=3)
        sizes = (batch, tokens, K, N, R, F, 3)
        expected = reference_of("GroupedLoraTrf", [*tensors.values(), np.array(ids)], filter_input)
        for in_place in (False, True):
            status, y = emulator.run(tensors, sizes, dtype, filter_input, ids, in_place)
            assert status == OK
            assert_close(y, expected, dtype, f"{sizes} {ids}")
            alone = np.array(ids) < 0
            np.testing.assert_array_equal(y[alone], tensors["base"][alone])


def test_grouped_launches_of_256_rows_each(emulator):
    emulator.gpu(600)
    tensors = tensors_of("GroupedLoraTrf", (517, 1), 19, 300, 4, 5, "float32", slots=2)
    ids = np.arange(517) % 3 - 1
    status, y = emulator.run(tensors, (517, 1, 19, 300, 4, 5, 2), "float32", adapter_ids=ids)
    assert status == OK
    assert emulator.gpu() == 3
    assert_close(y, reference_of("GroupedLoraTrf", [*tensors.values(), ids]), "float32", "517 rows")


@pytest.mark.parametrize("bad", [-2, 3, 2**40])
def test_adapter_ids_out_of_range(emulator, bad):
    tensors = tensors_of("GroupedLoraTrf", (3, 4), 19, 64, 4, 4, "float32", slots=3)
    status, _ = emulator.run(tensors, (3, 4, 19, 64, 4, 4, 3), "float32", adapter_ids=[0, -1, bad])
    assert (status, emulator.bad_row) == (BAD_ADAPTER_ID, 2)
    assert emulator.gpu() == 0


@pytest.mark.parametrize("op", ["LowRank", "TaskFilter", "LoraTrf"])
def test_no_tokens_is_no_launch(emulator, op):
    check(emulator, op, 0, 19, 99, 4, 4, "float32")
    assert emulator.gpu() == 0


def test_faults_are_statuses(emulator):
    tensors = tensors_of("LoraTrf", 3, 19, 64, 4, 4, "float32")
    for sizes, expected in [
        ((1, 3, 19, 64, 257, 4, 1), RANK_TOO_HIGH),
        ((1, 3, 19, 64, 4, 257, 1), RANK_TOO_HIGH),
        ((1, -3, 19, 64, 4, 4, 1), BAD_SIZE),
        ((1, 3, 0, 64, 4, 4, 1), BAD_SIZE),
        ((1, 3, 19, 2**31, 4, 4, 1), BAD_SIZE),
        ((1, 3, 19, 64, 0, 0, 1), BAD_SIZE),
        ((2, 3, 19, 64, 4, 4, 1), BAD_SIZE),
    ]:
        assert emulator.run(tensors, sizes, "float32")[0] == expected, sizes
    for name in ("x", "A", "B", "tau", "C", "D"):
        absent = {key: value for key, value in tensors.items() if key != name}
        assert emulator.run(absent, (1, 3, 19, 64, 4, 4, 1), "float32")[0] == NULL_POINTER, name
    assert emulator.gpu() == 0


def test_an_earlier_error_of_the_device_is_reported(emulator):
    emulator.gpu(error=700)
    tensors = tensors_of("LowRank", 3, 19, 64, 4, 0, "float32")
    status, _ = emulator.run(tensors, (1, 3, 19, 64, 4, 0, 1), "float32")
    assert (status, emulator.fault) == (DEVICE, "an illegal access")
    # The pretended GPU forgets it, as a real one forgets a launch that it refused.
    assert emulator.run(tensors, (1, 3, 19, 64, 4, 0, 1), "float32")[0] == OK
    assert emulator.gpu() == 1


def test_a_call_runs_where_its_tensors_are(emulator):
    emulator.devices(current=0, tensors=1)
    for multiprocessors in (1, 6):
        emulator.gpu(multiprocessors)
        check(emulator, "LoraTrf", 3, 300, 600, 8, 8, "float32")
        assert emulator.devices(current=0, tensors=1)[:2] == (0, 1)  # and the thread's own device is its again
    emulator.devices()
    check(emulator, "LoraTrf", 3, 300, 600, 8, 8, "float32")
    assert emulator.devices()[:2] == (0, 0)


def test_a_device_is_asked_once_for_each_kernel_and_size(emulator):
    emulator.devices()
    for _ in range(3):
        check(emulator, "LoraTrf", 3, 300, 600, 8, 8, "float32")
    assert emulator.devices()[2] == 1
    check(emulator, "LoraTrf", 3, 300, 600, 19, 8, "float32")
    check(emulator, "LoraTrf", 3, 300, 600, 8, 8, "float16")
    assert emulator.devices(tensors=1)[2] == 2
    check(emulator, "LoraTrf", 3, 300, 600, 8, 8, "float32")
    assert emulator.devices()[2] == 1


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_nan_and_infinity_stay_in_their_rows(emulator, multiprocessors):
    for dtype, (row, column, value) in itertools.product(TYPES, [(2, 7, np.nan), (17, 250, np.inf)]):
        emulator.gpu(multiprocessors)
        tensors = tensors_of("LoraTrf", 20, 99, 300, 8, 9, dtype)
        tensors["base"][row, column] = value
        status, y = emulator.run(tensors, (1, 20, 99, 300, 8, 9, 1), dtype)
        y = y.astype(np.float32)
        assert status == OK
        assert np.isfinite(np.delete(y, row, axis=0)).all()
        assert not np.isfinite(y[row, column])
        weights = tensors_of("LowRank", 20, 99, 300, 8, 0, dtype)
        weights["B"][50] = np.inf
        y = emulator.run(weights, (1, 20, 99, 300, 8, 0, 1), dtype)[1].astype(np.float32)
        assert np.isfinite(np.delete(y, 50, axis=1)).all()


@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_float16_sums_do_not_overflow(emulator, multiprocessors):
    # Squares of base, and u itself, are beyond float16.
    emulator.gpu(multiprocessors)
    tensors = tensors_of("LoraTrf", 19, 640, 300, 4, 5, "float16")
    tensors["base"] = (np.sign(tensors["base"]) * 6e4).astype(np.float16)
    tensors["tau"] = tensors["base"][0].copy()
    tensors["x"] = np.full_like(tensors["x"], 1e3)
    tensors["A"] = np.full_like(tensors["A"], 1)
    for name in ("B", "C", "D"):
        tensors[name] = (tensors[name] * np.float16(1e-3)).astype(np.float16)
    status, y = emulator.run(tensors, (1, 19, 640, 300, 4, 5, 1), "float16")
    assert status == OK
    assert np.isfinite(y).all()
    assert_close(y, reference_of("LoraTrf", tensors.values()), "float16", "6e4")


def test_norms_below_epsilon(emulator):
    tensors = tensors_of("TaskFilter", 19, 0, 99, 0, 5, "float32")
    sizes = (1, 19, 0, 99, 0, 5, 1)
    tiny = tensors | {"base": tensors["base"] * np.float32(1e-10), "D": tensors["D"] * 100}
    assert_close(
        emulator.run(tiny, sizes, "float32")[1], reference_of("TaskFilter", tiny.values()), "float32", "tiny z"
    )
    tiny = tensors | {"tau": tensors["tau"] * np.float32(1e-10), "D": tensors["D"] * 100}
    assert_close(
        emulator.run(tiny, sizes, "float32")[1], reference_of("TaskFilter", tiny.values()), "float32", "tiny tau"
    )
    for name in ("base", "tau"):
        zero = tensors | {name: np.zeros_like(tensors[name])}
        np.testing.assert_array_equal(emulator.run(zero, sizes, "float32")[1], zero["base"])


@pytest.fixture(scope="module")
def in_onnx_runtime(tmp_path_factory):
    """(emulator, session) of the custom-op library with the CUDA operators alone, registered for ONNX Runtime's CPU."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("ort")
    text = (SOURCES / "ort_library.cc").read_text()
    for old, new in [
        ('Device::kCuda ? "CUDAExecutionProvider" : nullptr', "Device::kCpu ? nullptr : nullptr"),
        ("{Device::kCpu, Device::kCuda}", "{Device::kCuda}"),
    ]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "library.cc").write_text(text)
    # The CPU's own kernels aren't called.
    isas = ", ".join(f"{name}{{}}" for name in ("kIsaBaseline", "kIsaAvx2", "kIsaAvx512"))
    (folder / "isas.cc").write_text(f'#include "kernels/isa.h"\nnamespace loratrf {{ extern const Isa {isas}; }}\n')
    sources = [folder / "library.cc", folder / "isas.cc"]
    sources += [SOURCES / f"{name}.cc" for name in ("ort_kernel", "operators", "check", "dispatch", "packed_memory")]
    sources += [SOURCES / "kernels" / name for name in ("loratrf.cc", "grouped.cc")]
    flags = ["-DLORATRF_MMA_ON_CPU", "-DLORATRF_WITH_CUDA", f"-I{SOURCES}", "-Wno-missing-field-initializers"]
    made = Emulator(folder / "library.so", *flags, *map(str, sources))
    return made, lambda model: session_of(model, folder / "library.so")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("op", "filter_input"), [*CASES, ("GroupedLoraTrf", "base")])
def test_in_onnx_runtime(in_onnx_runtime, op, filter_input, dtype):
    emulator, opened = in_onnx_runtime
    for constant, multiprocessors in itertools.product([(), WEIGHTS], [1, 6]):
        values = values_of(op, T=(3, 5), K=264, N=520, R=19, F=8)
        session = opened(model_of(op, values, dtype, constant, attributes_of(op, filter_input)))
        emulator.gpu(multiprocessors)  # 6 cut columns into pieces, which takes scratch
        for _ in range(3):
            expected = expected_of(op, values, dtype, filter_input)
            assert_close(run(session, values), expected, dtype, f"{op} in ONNX Runtime")
        assert emulator.gpu() == 3


def test_errors_in_onnx_runtime(in_onnx_runtime):
    emulator, opened = in_onnx_runtime
    values = values_of("LoraTrf", K=264, N=520)
    emulator.devices()
    session = opened(model_of("LoraTrf", values))
    assert emulator.devices()[3] == 2  # Tiles and Split, before any run
    emulator.gpu(6, error=700)
    with pytest.raises(Exception, match=r'FAIL.*LoraTrf: CUDA reports "an illegal access", of this launch'):
        run(session, values)
    assert_close(run(session, values), expected_of("LoraTrf", values, "float32", "adapted"), "float32")
    high = values_of("LoraTrf", K=264, N=520, R=257)
    with pytest.raises(Exception, match=r"rank 257, the kernels take at most 256"):
        run(opened(model_of("LoraTrf", high)), high)
    grouped = values_of("GroupedLoraTrf")
    session = opened(model_of("GroupedLoraTrf", grouped, attributes={"filter_input": "adapted"}))
    grouped["adapter_ids"][1] = 9
    with pytest.raises(Exception, match=r"GroupedLoraTrf: adapter_ids\[1\] is 9"):
        run(session, grouped)
