"""GroupedLoraTrf: one adapter per batch row. The kernel, its function body in two runtimes, and hostile calls."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from loratrf_deploy.ops import schemas
from loratrf_deploy.ops.dtypes import DTYPES
from operators import built_kernels, expected_of, model_of, reference_of, run, session_of, values_of
from tolerances import assert_close, assert_rounded_once

torch = pytest.importorskip("torch")
kernels = built_kernels()

# (batch, tokens, K, N, R, F, S): one row, rows of one token, rows of several tiles, whole batches of one tile; halves
# that no adapter has; sizes that no lane count divides.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (5, 1, 19, 99, 4, 7, 3),
    (7, 4, 99, 19, 5, 2, 9),
    (9, 16, 513, 600, 8, 8, 4),
    (4, 33, 99, 989, 19, 33, 2),
    (3, 300, 64, 99, 65, 1, 5),
    (6, 5, 19, 99, 0, 7, 3),
    (6, 40, 19, 99, 4, 0, 3),
    (6, 3, 19, 99, 0, 0, 3),
]


def tensors_of(sizes, dtype="float32", ids=None, seed=0):
    """base, x, A, B, tau, C, D and adapter_ids; about half of the tokens pass their adapter's filter."""
    batch, tokens, K, N, R, F, S = sizes
    *values, cycle = values_of("GroupedLoraTrf", (batch, tokens), K, N, R, F, seed, S).values()
    tensors = [torch.from_numpy(value).to(getattr(torch, dtype)) for value in values]
    return [*tensors, torch.tensor(cycle.copy() if ids is None else ids, dtype=torch.int64)]


def compute(tensors, filter_input="adapted", *, out=None, **options):
    """The kernel's result, into poisoned memory unless `out` is given, and the reference's."""
    if out is None:
        out = torch.full_like(tensors[0], float("nan"))
    expected = reference_of("GroupedLoraTrf", tensors, filter_input)
    kernels.run("GroupedLoraTrf", tensors, out, filter_input, **options)
    return out.double().numpy(), expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filter_input", schemas.FILTER_INPUTS)
def test_matches_reference(isa, dtype, filter_input):
    for sizes in SIZES:
        what = f"{filter_input} {isa} batch,tokens,K,N,R,F,S={sizes}"
        actual, expected = compute(tensors_of(sizes, dtype), filter_input)
        assert_close(actual, expected, dtype, what)
        if dtype != "float32":
            assert_rounded_once(actual, expected, dtype, what)


ORDERS = {
    "one adapter": [2] * 8,
    "every row its own": [3, 0, 5, 1, 7, 2, 6, 4],
    "neighbours": [1, 1, 1, 0, 0, -1, -1, 1],
    "alternating": [0, 1] * 4,
    "base alone": [-1] * 8,
    "two runs": [4, 4, 4, 4, 4, 4, 4, -1],
}


@pytest.mark.parametrize("order", ORDERS)
def test_each_row_is_its_own_adapters(isa, order):
    # Against the single-adapter kernel, whose own tests hold it to the reference.
    for tokens in (1, 6, 50):
        tensors = tensors_of((8, tokens, 99, 600, 8, 19, 8), ids=ORDERS[order])
        actual, _ = compute(tensors)
        base, x, A, B, tau, C, D, ids = tensors
        for row, slot in enumerate(ids.tolist()):
            expected = base[row].clone()
            if slot >= 0:
                kernels.run("LoraTrf", [base[row], x[row], A[slot], B[slot], tau[slot], C[slot], D[slot]], expected)
            assert_close(actual[row], expected.double(), "float32", f"{order}, {tokens} tokens, row {row}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_an_adapter_are_base_to_the_bit(dtype):
    for halves in ((4, 7), (0, 0)):
        tensors = tensors_of((9, 5, 19, 99, *halves, 2), dtype, ids=[-1, 0, -1, -1, 1, 1, -1, 0, -1])
        out = torch.full_like(tensors[0], 7)
        kernels.run("GroupedLoraTrf", tensors, out)
        away = tensors[7] < 0
        bits = torch.int32 if dtype == "float32" else torch.int16
        assert torch.equal(out[away].view(bits), tensors[0][away].view(bits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(isa, dtype):
    for ids in ([0, 1, 1, -1, 2, 0], [1] * 6):
        tensors = tensors_of((6, 30, 99, 600, 8, 19, 3), dtype, ids=ids)
        apart, _ = compute(tensors)
        copies = [tensor.clone() for tensor in tensors]
        inside, _ = compute(copies, out=copies[0])
        np.testing.assert_array_equal(inside, apart)


def test_same_result_on_any_number_of_threads():
    for sizes in ((64, 1, 600, 700, 8, 8, 9), (7, 131, 99, 1300, 19, 33, 4), (2, 9, 1100, 1300, 19, 33, 2)):
        tensors = tensors_of(sizes)
        alone, _ = compute(tensors, threads=1)
        for threads in (2, 5):
            np.testing.assert_array_equal(compute(tensors, threads=threads)[0], alone)


def test_zero_padding_of_ranks_changes_nothing(isa):
    base, x, A, B, tau, C, D, ids = tensors_of((6, 9, 19, 99, 3, 5, 2), ids=[0, 1, -1, 1, 0, 0])
    _, expected = compute([base, x, A, B, tau, C, D, ids])
    pad = torch.nn.functional.pad
    padded = [pad(A, (0, 0, 0, 30)), pad(B, (0, 30)), tau, pad(C, (0, 0, 0, 4)), pad(D, (0, 4))]
    assert_close(compute([base, x, *padded, ids])[0], expected, "float32", "padded")
    # An adapter that lacks a half, among others that have it: zeros, and exactly no effect.
    for weight in (A, B, tau, C, D):
        weight[1] = 0
    actual, _ = compute([base, x, A, B, tau, C, D, ids])
    np.testing.assert_array_equal(actual[[1, 3]], base[[1, 3]].double().numpy())


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_token_and_its_slot(isa, dtype, tokens):
    tensors = tensors_of((6, tokens + 1, 19, 99, 4, 5, 4), dtype, ids=[0, 1, -1, 1, 3, 0])
    tensors[0][4, tokens, 7] = float("nan")
    for weight in tensors[2:7]:
        weight[1] = float("nan")
        weight[2] = float("inf")  # no row's
    out = torch.zeros_like(tensors[0])
    kernels.run("GroupedLoraTrf", tensors, out)
    assert torch.isnan(out[[1, 3]]).all()
    assert torch.isnan(out[4, tokens]).all()
    assert torch.isfinite(out[[0, 2, 5]]).all()
    assert torch.isfinite(out[4, :tokens]).all()


def test_slots_that_no_row_names_are_not_read(tmp_path):
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc to read the memory from")

    def resident() -> int:
        return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    # Pages of a mapped file that nobody reads take no memory: 3 GB of slots in sparse files, of which two are used.
    S = 30_000
    shapes = [(S, 8, 256), (S, 1024, 8), (S, 1024), (S, 8, 1024), (S, 1024, 8)]
    weights = [np.memmap(tmp_path / str(i), np.float32, "w+", shape=shape) for i, shape in enumerate(shapes)]
    base, x = np.ones((4, 6, 1024), np.float32), np.ones((4, 6, 256), np.float32)
    for weight in weights:
        weight[[3, S - 1]] = 1e-2
    out = np.empty_like(base)
    before = resident()
    kernels.run("GroupedLoraTrf", [base, x, *weights, np.array([3, -1, S - 1, 3])], out)
    assert resident() - before < 20e6
    assert (out[1] == 1).all()
    assert (out[[0, 2, 3]] != 1).all()


def test_batches_and_rows_of_nothing():
    for sizes in ((0, 5, 19, 99, 4, 7, 3), (4, 0, 19, 99, 4, 7, 3)):
        assert compute(tensors_of(sizes))[0].shape == (*sizes[:2], 99)
    # No slots at all: every row is the base's.
    tensors = tensors_of((4, 3, 19, 99, 4, 7, 0), ids=[-1] * 4)
    np.testing.assert_array_equal(compute(tensors)[0], tensors[0].double().numpy())


WRONG = {
    "id too high": (
        {"adapter_ids": [0, 1, 3, 0]},
        r"adapter_ids\[2\] is 3, expected -1 \(base alone\) to 2 \(3 slots\)",
    ),
    "id below -1": ({"adapter_ids": [0, 1, 0, -2]}, r"adapter_ids\[3\] is -2, expected -1"),
    "id far out": ({"adapter_ids": [-(2**63), 0, 0, 0]}, r"adapter_ids\[0\] is -9223372036854775808"),
    "too few ids": ({"adapter_ids": [0, 1]}, r"adapter_ids is \(2\), expected \(batch = 4\)"),
    "ids as a matrix": ({"adapter_ids": [[0], [0], [0], [0]]}, r"adapter_ids is \(4, 1\), expected \(batch = 4\)"),
    "other slots in B": ({"B": (2, 99, 8)}, r"B is \(2, 99, 8\), expected \(S = 3, N = 99, R = 8\)"),
    "other slots in tau": ({"tau": (4, 99)}, r"tau is \(4, 99\), expected \(S = 3, N = 99\)"),
    "no slots dimension": ({"A": (8, 19)}, r"A is \(8, 19\), expected \(S, R, K = 19\)"),
    "tau without slots": ({"tau": (99,)}, r"tau is \(99\), expected \(S = 3, N = 99\)"),
    "wrong K": ({"A": (3, 8, 18)}, r"A is \(3, 8, 18\), expected \(S = 3, R, K = 19\)"),
    "wrong R": ({"B": (3, 99, 7)}, r"B is \(3, 99, 7\), expected \(S = 3, N = 99, R = 8\)"),
    "half a low-rank half": ({"A": (3, 0, 19)}, r"B is \(3, 99, 8\), expected \(S = 3, N = 99, R = 0\)"),
    "C transposed": ({"C": (3, 99, 5)}, r"C is \(3, 99, 5\), expected \(S = 3, F, N = 99\)"),
    "D transposed": ({"D": (3, 5, 99)}, r"D is \(3, 5, 99\), expected \(S = 3, N = 99, F = 5\)"),
    "rank over limit": ({"A": (3, 1025, 19), "B": (3, 99, 1025)}, r"rank 1025, the kernels take at most 1024"),
    "no batch": ({"base": (99,), "x": (19,)}, r"base is \(99\), expected \(batch, ..., N\)"),
    "other tokens": ({"x": (4, 6, 19)}, r"x is \(4, 6, 19\), expected the leading dimensions of base"),
    "ids for no slots": (
        {"A": (0, 8, 19), "B": (0, 99, 8), "tau": (0, 99), "C": (0, 5, 99), "D": (0, 99, 5)},
        r"adapter_ids\[0\] is 0, expected -1 \(base alone\) to -1 \(0 slots\)",
    ),
}
SHAPES = {
    "base": (4, 5, 99),
    "x": (4, 5, 19),
    "A": (3, 8, 19),
    "B": (3, 99, 8),
    "tau": (3, 99),
    "C": (3, 5, 99),
    "D": (3, 99, 5),
    "adapter_ids": [0, 1, 2, 0],
}


def faulty(fault):
    changes, message = WRONG[fault]
    made = {}
    for name, value in (SHAPES | changes).items():
        made[name] = np.array(value, np.int64) if name == "adapter_ids" else np.ones(value, np.float32)
    return made, rf"GroupedLoraTrf: .*{message}"


@pytest.mark.parametrize("fault", WRONG)
def test_calls_that_do_not_fit(fault):
    values, message = faulty(fault)
    out = np.full(values["base"].shape, 7, np.float32)
    with pytest.raises(ValueError, match=message):
        kernels.run("GroupedLoraTrf", values.values(), out)
    assert (out == 7).all()


@pytest.mark.parametrize("fault", WRONG)
def test_nodes_that_do_not_fit(fault):
    values, message = faulty(fault)
    session = session_of(model_of("GroupedLoraTrf", values))
    with pytest.raises(Exception, match=message):
        run(session, values)


@pytest.mark.parametrize("fault", ["id too high", "id below -1", "id far out", "ids for no slots", "too few ids"])
def test_function_body_refuses_ids_too(fault):
    values, _ = faulty(fault)
    with pytest.raises(Exception, match="reshaped" if fault == "too few ids" else "out of data bounds"):
        run(session_of(model_of("GroupedLoraTrf", values), library=False), values)


def test_ids_are_int64():
    tensors = tensors_of((4, 5, 19, 99, 4, 7, 3))
    out = torch.empty_like(tensors[0])
    for wrong in (tensors[7].to(torch.int32), tensors[7].float()):
        for convert in (lambda tensor: tensor, lambda tensor: tensor.numpy()):
            with pytest.raises(TypeError, match=r"adapter_ids is of .*, expected int64"):
                kernels.run("GroupedLoraTrf", [*tensors[:7], convert(wrong)], out)
    with pytest.raises(TypeError, match="expected float32, float16 or bfloat16"):
        kernels.run("GroupedLoraTrf", [tensors[7], *tensors[1:]], out)
    values = values_of("GroupedLoraTrf")
    with pytest.raises(Exception, match=r"(?i)type"):
        session_of(model_of("GroupedLoraTrf", values, types={"adapter_ids": "float32"}, functions=False))
    with pytest.raises(ValueError, match='GroupedLoraTrf: filter_input is "both"'):
        kernels.run("GroupedLoraTrf", tensors, out, "both")


LEADS = [(1,), (6,), (5, 1), (5, 9), (5, 3, 4), (0,), (0, 4), (4, 0)]


@pytest.mark.parametrize("halves", [(4, 7), (0, 7), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("filter_input", schemas.FILTER_INPUTS)
def test_function_body_is_its_twin(filter_input, halves):
    onnx_reference = pytest.importorskip("onnx.reference")
    onnx = pytest.importorskip("onnx")
    for lead in LEADS:
        values = values_of("GroupedLoraTrf", lead, R=halves[0], F=halves[1])
        model = model_of("GroupedLoraTrf", values, attributes={"filter_input": filter_input})
        expected = expected_of("GroupedLoraTrf", values, "float32", filter_input)
        evaluator = onnx_reference.ReferenceEvaluator(onnx.load_from_string(model))
        results = {
            "kernel": run(session_of(model), values),
            "function in ONNX Runtime": run(session_of(model, library=False), values),
            "function in ONNX's evaluator": evaluator.run(None, values)[0],
        }
        for name, actual in results.items():
            assert_close(actual, expected, "float32", f"{name} {lead}")
            away = values["adapter_ids"] < 0
            np.testing.assert_array_equal(actual[away], values["base"][away])


@pytest.mark.parametrize("library", [True, False], ids=["kernel", "function"])
def test_no_slots_in_a_graph(library):
    values = values_of("GroupedLoraTrf", (4, 5), S=0)
    assert (values["adapter_ids"] == -1).all()
    actual = run(session_of(model_of("GroupedLoraTrf", values), library=library), values)
    np.testing.assert_array_equal(actual, values["base"])


def test_slots_are_read_anew_in_every_run():
    values = values_of("GroupedLoraTrf", (6, 5))
    session = session_of(model_of("GroupedLoraTrf", values))
    for seed, S, R, F in ((0, 3, 4, 7), (1, 3, 4, 7), (2, 9, 33, 1), (3, 1, 1, 0)):
        values = values_of("GroupedLoraTrf", (6, 5), S=S, R=R, F=F, seed=seed)
        expected = expected_of("GroupedLoraTrf", values, "float32", "adapted")
        assert_close(run(session, values), expected, "float32", f"slots {seed}")
