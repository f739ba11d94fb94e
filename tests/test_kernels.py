"""The CPU kernels against the float64 reference: every instruction set, dtype, plan and awkward size."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from loratrf_deploy.ops import schemas
from loratrf_deploy.ops.dtypes import DTYPES
from operators import CASES, attributes_of, built_kernels, cpu_has, in_threads, reference_of, values_of
from tolerances import assert_close, assert_rounded_once

torch = pytest.importorskip("torch")
kernels = built_kernels()

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "kernels"

# (T, K, N, R, F): one token to several tiles, on both sides of every plan's limits; sizes that no lane count divides.
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 19, 99, 1, 19),
    (1, 2048, 989, 64, 33),
    (2, 99, 19, 5, 2),
    (4, 989, 99, 19, 16),
    (5, 99, 989, 19, 64),
    (19, 989, 989, 8, 8),
    (25, 513, 1025, 100, 7),
    (99, 64, 99, 65, 1),
    (131, 99, 600, 16, 17),
]  # fmt: skip


@pytest.fixture(params=[False, True], ids=["raw", "prepacked"])
def prepack(request):
    return request.param


def tensors_of(sizes, dtype, seed=0):
    """base, x, A, B, tau, C, D of a call; about half of the tokens pass the filter."""
    values = values_of("LoraTrf", *sizes, seed).values()
    return [torch.from_numpy(value).to(getattr(torch, dtype)) for value in values]


def compute(op, tensors, filter_input="adapted", *, out=None, **options):
    """The kernel's result and the reference's. `out` is poisoned unless it is given."""
    given = dict(zip(schemas.OPS["LoraTrf"].inputs, tensors, strict=True), z=tensors[0])
    inputs = [given[name] for name in schemas.OPS[op].inputs]
    if out is None:
        out = torch.full_like(inputs[0], float("nan"))
    expected = reference_of(op, inputs, filter_input)
    kernels.run(op, inputs, out, **attributes_of(op, filter_input), **options)
    return out.double().numpy(), expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "filter_input"), CASES)
def test_matches_reference(isa, prepack, dtype, op, filter_input):
    for sizes in SIZES:
        what = f"{op} {filter_input} {isa} T,K,N,R,F={sizes}"
        tensors = tensors_of(sizes, dtype)
        actual, expected = compute(op, tensors, filter_input, prepack=prepack)
        assert_close(actual, expected, dtype, what)
        if dtype != "float32":
            assert_rounded_once(actual, expected, dtype, what)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 3, 19, 99])
@pytest.mark.parametrize(("op", "filter_input"), CASES)
def test_in_place(isa, dtype, T, op, filter_input):
    tensors = tensors_of((T, 99, 600, 8, 19), dtype)
    apart, _ = compute(op, tensors, filter_input)
    copies = [tensor.clone() for tensor in tensors]
    inside, _ = compute(op, copies, filter_input, out=copies[0])
    np.testing.assert_array_equal(inside, apart)


@pytest.mark.parametrize(("op", "filter_input"), CASES)
def test_same_result_on_any_number_of_threads(op, filter_input):
    for T in (1, 8, 131):
        tensors = tensors_of((T, 1100, 1300, 19, 33), "float32")
        alone, _ = compute(op, tensors, filter_input, threads=1)
        for threads in (2, 5):
            together, _ = compute(op, tensors, filter_input, threads=threads)
            np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "filter_input"), CASES)
def test_no_tokens(dtype, op, filter_input):
    actual, _ = compute(op, tensors_of((0, 19, 99, 4, 4), dtype), filter_input)
    assert actual.shape == (0, 99)


def test_leading_dimensions_are_tokens(isa):
    tensors = tensors_of((6, 19, 99, 4, 5), "float32")
    flat, _ = compute("LoraTrf", tensors)
    shaped = [tensors[0].reshape(2, 1, 3, 99), tensors[1].reshape(2, 1, 3, 19), *tensors[2:]]
    np.testing.assert_array_equal(compute("LoraTrf", shaped)[0].reshape(6, 99), flat)
    one = [tensors[0][0], tensors[1][0], *tensors[2:]]
    np.testing.assert_allclose(compute("LoraTrf", one)[0], flat[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_point_away_are_left_alone(isa, dtype):
    _, x, A, B, tau, C, D = tensors_of((40, 19, 99, 4, 5), dtype)
    away = -tau.expand(40, 99) * torch.linspace(0.5, 2, 40)[:, None].to(tau.dtype)
    actual, _ = compute("TaskFilter", [away.contiguous(), x, A, B, tau, C, D])
    np.testing.assert_array_equal(actual, away.double().numpy())


def test_tokens_along_tau_pass_whole(isa):
    _, x, A, B, tau, C, D = tensors_of((64, 19, 989, 4, 5), "float32")
    along = tau.expand(64, 989) * torch.linspace(0.1, 7, 64)[:, None]
    actual, expected = compute("TaskFilter", [along.contiguous(), x, A, B, tau, C, D])
    assert_close(actual, expected, "float32", "s = 1")


@pytest.mark.parametrize("zero", ["z", "tau", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_vectors_divide_by_epsilon(isa, dtype, zero):
    base, x, A, B, tau, C, D = tensors_of((7, 19, 99, 4, 5), dtype)
    base = base * 0 if zero != "tau" else base
    tau = tau * 0 if zero != "z" else tau
    actual, _ = compute("TaskFilter", [base, x, A, B, tau, C, D])
    np.testing.assert_array_equal(actual, base.double().numpy())


@pytest.mark.parametrize("T", [1, 40])
def test_tiny_vectors_divide_by_epsilon(isa, T):
    # Norms far below epsilon: the score is <z,tau> / (eps |tau|), not a cosine.
    base, x, A, B, tau, C, D = tensors_of((T, 19, 99, 4, 5), "float32")
    actual, expected = compute("TaskFilter", [base * 1e-10, x, A, B, tau, C, D * 100])
    assert_close(actual, expected, "float32", "tiny z")


@pytest.mark.parametrize("T", [1, 40])
def test_float16_squares_do_not_overflow(isa, T):
    base, x, A, B, tau, C, D = tensors_of((T, 19, 989, 4, 5), "float16")
    base = torch.full_like(base, 6e4) * torch.sign(base)
    tau = base[0].clone()
    actual, expected = compute("TaskFilter", [base, x, A, B, tau, C * 1e-2, D * 1e-2])
    assert np.isfinite(actual).all()
    assert_close(actual, expected, "float16", "6e4")


@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_weights_stay_in_their_rows(isa, dtype, T):
    # Row tails are read in whole vectors that reach into the next row: what is there must not leak.
    base, x, A, B, *_ = tensors_of((T, 19, 99, 3, 5), dtype)
    B[50] = float("inf")
    out = torch.empty_like(base)
    kernels.run("LowRank", [base, x, A, B], out)
    assert torch.isfinite(out[:, :50]).all()
    assert torch.isfinite(out[:, 51:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 40])
def test_nan_stays_in_its_token(isa, dtype, T):
    tensors = tensors_of((T + 1, 19, 99, 4, 5), dtype)
    tensors[0][T, 7] = float("nan")
    out = torch.zeros_like(tensors[0])
    kernels.run("LoraTrf", tensors, out, "adapted")
    assert torch.isfinite(out[:T]).all()
    assert torch.isnan(out[T]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_value_survives(isa, dtype):
    # With B = 0, y is base: loads and stores of all 65536 bit patterns, NaNs aside.
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    base = bits[torch.isfinite(bits)][None]
    N = base.shape[1]
    out = torch.empty_like(base)
    zero = {"x": torch.zeros(1, 1), "A": torch.zeros(1, 1), "B": torch.zeros(N, 1)}
    kernels.run("LowRank", [base, *(value.to(base.dtype) for value in zero.values())], out)
    torch.testing.assert_close(out, base, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_to_nearest_even(isa, dtype):
    # base + u·B over sums on, below and above the middle between two halves, with subnormals and overflow.
    generator = torch.Generator().manual_seed(1)
    scale = 2.0 ** torch.randint(-26, 17, (1, 4096), generator=generator).float()
    base = (torch.randn(1, 4096, generator=generator) * scale).clamp(-65504, 65504).to(getattr(torch, dtype))
    step = torch.randint(-4, 5, (4096, 1), generator=generator) * 2.0**-12
    B = (base.float().T * step).to(base.dtype)
    one = torch.ones(1, 1, dtype=base.dtype)
    out = torch.empty_like(base)
    kernels.run("LowRank", [base, one, one, B], out)
    exact = (base.double() + B.double().T).to(torch.float32)  # exact in float32 but for a rare double rounding
    expected = exact.to(base.dtype)
    assert (out != expected).float().mean() < 1e-3


def test_strided_tensors_are_refused():
    base, x, A, B, *_ = tensors_of((4, 19, 99, 4, 5), "float32")
    with pytest.raises(ValueError, match="B is strided"):
        kernels.run("LowRank", [base, x, A, B.T.contiguous().T], torch.empty_like(base))
    with pytest.raises(ValueError, match="x is strided"):
        kernels.run(
            "LowRank", [base.numpy(), x.T.contiguous().numpy().T, A.numpy(), B.numpy()], np.empty((4, 99), np.float32)
        )


def test_numpy_arrays_read_only_too():
    tensors = [tensor.numpy() for tensor in tensors_of((4, 19, 99, 4, 5), "float16")]
    for tensor in tensors:
        tensor.setflags(write=False)
    out = np.empty((4, 99), np.float16)
    kernels.run("LoraTrf", tensors, out)
    assert_close(out, reference_of("LoraTrf", tensors), "float16", "numpy")
    out.setflags(write=False)
    with pytest.raises((BufferError, ValueError), match=r"read-?only|not writ"):
        kernels.run("LoraTrf", tensors, out)


WRONG = {
    "wrong K": ({"x": (4, 20)}, r"A is \(8, 19\), expected \(R, K = 20\)"),
    "wrong R": ({"B": (99, 7)}, r"B is \(99, 7\), expected \(N = 99, R = 8\)"),
    "wrong tau": ({"tau": (98,)}, r"tau is \(98\), expected \(N = 99\)"),
    "C transposed": ({"C": (99, 5)}, r"C is \(99, 5\), expected \(F, N = 99\)"),
    "D transposed": ({"D": (5, 99)}, r"D is \(5, 99\), expected \(N = 99, F = 5\)"),
    "other tokens": ({"x": (5, 19)}, r"x is \(5, 19\), expected the leading dimensions of base"),
    "rank over limit": ({"A": (1025, 19), "B": (99, 1025)}, r"rank 1025, the kernels take at most 1024"),
    "rank 0": ({"A": (0, 19), "B": (99, 0)}, r"A is \(0, 19\), expected \(R, K = 19\)"),
    "no features": ({"x": (4, 0), "A": (8, 0)}, r"x is \(4, 0\)"),
    "3-D weight": ({"A": (1, 8, 19)}, r"A is \(1, 8, 19\)"),
    "scalar x": ({"x": ()}, r"x is \(\)"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_shapes_that_do_not_fit(fault):
    shapes = {"base": (4, 99), "x": (4, 19), "A": (8, 19), "B": (99, 8), "tau": (99,), "C": (5, 99), "D": (99, 5)}
    changes, message = WRONG[fault]
    tensors = [torch.zeros(shape) for shape in (shapes | changes).values()]
    with pytest.raises(ValueError, match=message) as error:
        kernels.run("LoraTrf", tensors, torch.empty(4, 99))
    assert str(error.value).startswith("LoraTrf: ")


def test_other_faults():
    base, x, A, B, tau, C, D = tensors_of((4, 19, 99, 4, 5), "float32")
    out = torch.empty_like(base)
    with pytest.raises(ValueError, match='filter_input is "both", expected "adapted" or "base"'):
        kernels.run("LoraTrf", [base, x, A, B, tau, C, D], out, "both")
    with pytest.raises(TypeError, match="x is of another dtype than base"):
        kernels.run("LowRank", [base, x.half(), A, B], out)
    with pytest.raises(TypeError, match="expected float32, float16 or bfloat16"):
        kernels.run("LowRank", [base.double(), x, A, B], out)
    with pytest.raises(TypeError, match="expected float32, float16 or bfloat16"):
        kernels.run("LowRank", [base.numpy().astype(np.int32), x, A, B], out)
    with pytest.raises(TypeError, match="a list, expected a numpy array or a torch tensor"):
        kernels.run("LowRank", [[1.0], x, A, B], out)
    with pytest.raises(ValueError, match=r"out is \(4, 98\), expected \(4, 99\)"):
        kernels.run("LowRank", [base, x, A, B], torch.empty(4, 98))
    with pytest.raises(ValueError, match="No operator LowRank of 3 inputs"):
        kernels.run("LowRank", [base, x, A], out)
    with pytest.raises(ValueError, match="No operator LowRunk of 4 inputs"):
        kernels.run("LowRunk", [base, x, A, B], out)
    with pytest.raises(ValueError, match='Instruction set "mmx"'):
        kernels.set_isa("mmx")


def test_instruction_sets_are_the_cpus():
    if (expected := cpu_has()) is None:
        pytest.skip("no flags in /proc/cpuinfo")
    assert [name for name in kernels.isas() if name != "lanes16"] == expected


def test_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("LORATRF_ISA", "baseline")
    assert kernels.isa() == "baseline"
    monkeypatch.setenv("LORATRF_ISA", "mmx")
    with pytest.raises(ValueError, match='LORATRF_ISA is "mmx"'):
        kernels.isa()


def test_many_threads_at_once():
    tensors = tensors_of((40, 99, 600, 8, 19), "float32")
    expected, _ = compute("LoraTrf", tensors, threads=1)

    def work():
        for _ in range(20):
            np.testing.assert_array_equal(compute("LoraTrf", tensors, threads=3)[0], expected)

    in_threads(work)


def test_tables_agree():
    assert kernels.MAX_RANK == schemas.MAX_RANK
    assert kernels.MAX_CUDA_RANK in (0, schemas.MAX_CUDA_RANK)
    assert {name: schema.inputs for name, schema in schemas.OPS.items()} == kernels.OPS


def test_kernels_include_no_framework():
    system = {"stddef.h", "stdint.h", "stdlib.h", "string.h", "cpuid.h", "immintrin.h", "arm_neon.h"}
    cuda = system | {"cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "cooperative_groups.h", "limits.h", "type_traits"}
    cuda |= {"map", "mutex", "tuple"}  # its host side's
    for folder, allowed in ((KERNELS, system), (KERNELS / "cuda", cuda)):
        sources = [path for path in folder.iterdir() if path.is_file()]
        assert sources
        for path in sources:
            included = set(re.findall(r'#include [<"](.+?)[>"]', path.read_text()))
            own = {name for name in included if (folder / name).resolve().is_relative_to(KERNELS.resolve())}
            own = {name for name in own if (folder / name).is_file()}
            assert included <= allowed | own, f"{path.name} includes {sorted(included - allowed - own)}"


def test_no_function_is_shared_between_instruction_sets(tmp_path):
    # A weak symbol is one that the linker may take from another file, and with it that file's instructions.
    if not shutil.which("g++") or not shutil.which("nm"):
        pytest.skip("g++ or nm is not installed")
    done = tmp_path / "isa.o"
    flags = ["-std=c++17", "-O0", "-w", "-fno-exceptions", f"-I{KERNELS}", "-c"]
    subprocess.run(["g++", *flags, str(KERNELS / "isa_lanes16.cc"), "-o", str(done)], check=True)
    symbols = subprocess.run(["nm", "-C", "--defined-only", str(done)], check=True, capture_output=True, text=True)
    shared = [line for line in symbols.stdout.splitlines() if line.split()[1] in "TWVuB"]
    assert not shared


def test_aarch64_under_qemu(tmp_path):
    # Debian: apt-get install g++-aarch64-linux-gnu qemu-user
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("aarch64-linux-gnu-g++ or qemu-aarch64 is not installed")
    program = tmp_path / "selftest"
    sources = [ROOT / "tests" / "kernel_selftest.cc"]
    sources += [KERNELS / name for name in ("loratrf.cc", "grouped.cc", "isa_baseline.cc")]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=fast", "-fno-math-errno", "-static"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([emulator, str(program)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all passed" in result.stdout
