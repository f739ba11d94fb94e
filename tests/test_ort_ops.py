"""The custom-op library in ONNX Runtime: values, the function body as its twin, hostile nodes, in-place, threads."""

from __future__ import annotations

import itertools
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from loratrf_deploy import UserError, library_path
from loratrf_deploy.ops import schemas
from loratrf_deploy.ops.dtypes import DTYPES
from operators import (
    CASES,
    FUNCTIONS,
    GROUPED_CASES,
    OPSET,
    TYPES,
    WEIGHTS,
    attributes_of,
    expected_of,
    in_threads,
    model_of,
    run,
    session_of,
    values_of,
)  # fmt: skip
from tolerances import assert_close, assert_rounded_once

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parent.parent
try:
    LIBRARY = library_path()
except UserError:
    pytest.skip("libloratrf_ort.so is not built", allow_module_level=True)


@pytest.mark.parametrize("constant", [(), WEIGHTS, ("A", "D")], ids=["inputs", "constants", "mixed"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("op", "filter_input"), CASES + GROUPED_CASES)
def test_matches_reference_and_function_body(op, filter_input, dtype, constant):
    attributes = attributes_of(op, filter_input)
    for T in (1, (4, 5), (3, 1, 33)):
        values = values_of(op, T, K=99, N=600, R=19, F=8)
        model = model_of(op, values, dtype, constant, attributes)
        expected = expected_of(op, values, dtype, filter_input)
        kernel = run(session_of(model), values)
        what = f"{op} {filter_input} T={T}"
        assert_close(kernel, expected, dtype, f"{what} kernel")
        assert_close(run(session_of(model, library=False), values), expected, dtype, f"{what} function")
        if dtype != "float32":
            assert_rounded_once(kernel, expected, dtype, what)


@pytest.mark.parametrize("op", schemas.OPS)
def test_registered_as_in_the_table(op):
    schema = schemas.OPS[op]
    for dtype in DTYPES:
        values = values_of(op)
        session_of(model_of(op, values, dtype, functions=False))
        with pytest.raises(Exception, match=r"(?i)input|arity|invalid|in position"):
            session_of(model_of(op, dict(list(values.items())[:-1]), dtype, functions=False))
    # Defaults: a node without attributes is one with the table's.
    if schema.attributes:
        values = values_of(op)
        given = run(session_of(model_of(op, values, attributes=schema.attributes, functions=False)), values)
        np.testing.assert_array_equal(run(session_of(model_of(op, values, functions=False)), values), given)


def test_exports_only_its_entry_points():
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(LIBRARY)], check=True, capture_output=True, text=True)
    names = {line.split()[-1] for line in symbols.stdout.splitlines()}
    assert names - {"loratrf_run_on_cuda"} == {
        "RegisterCustomOps",
        *(f"loratrf_{name}" for name in ("isa", "max_rank", "message", "operators", "run")),
    }


def test_needs_no_cpp_runtime():
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    text = subprocess.run(["objdump", "-p", str(LIBRARY)], check=True, capture_output=True, text=True).stdout
    needed = {line.split()[-1] for line in text.splitlines() if "NEEDED" in line}
    if any("asan" in library for library in needed):
        pytest.skip("a sanitizer build brings run-times")
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}


LEADS = [(1,), (4,), (2, 3, 1, 2), (0,), (3, 0)]


# A grouped call has a batch dimension at least: test_grouped_op.py holds that it says so.
@pytest.mark.parametrize(
    ("op", "T"), [*itertools.product(schemas.OPS, LEADS), *((op, ()) for op in list(FUNCTIONS)[:3])]
)
def test_any_leading_dimensions(op, T):
    values = values_of(op, T)
    actual = run(session_of(model_of(op, values, constant=WEIGHTS)), values)
    assert actual.shape == (*T, 99)
    assert_close(actual, expected_of(op, values, "float32", "adapted"), "float32", f"{op} {T}")


def test_output_shape_is_inferred():
    values = values_of("LowRank")
    shapes = {"base": ["batch", "sequence", 99], "x": ["batch", "sequence", 19]}
    shapes = {name: ir.Shape(shape) for name, shape in shapes.items()}
    session = session_of(model_of("LowRank", values, constant=("A", "B"), functions=False, shapes=shapes))
    assert session.get_outputs()[0].shape == ["batch", "sequence", 99]


def change(name, *shape):
    return lambda values: values | {name: np.zeros(shape, np.float32)}


HOSTILE = {
    "wrong K": (change("A", 4, 18), r"LoraTrf: A is \(4, 18\), expected \(R, K = 19\)\. Shapes: base \(2, 5, 99\)"),
    "wrong R": (change("B", 99, 5), r"LoraTrf: B is \(99, 5\), expected \(N = 99, R = 4\)"),
    "wrong tau": (change("tau", 98), r"LoraTrf: tau is \(98\), expected \(N = 99\)"),
    "tau is a matrix": (change("tau", 1, 99), r"LoraTrf: tau is \(1, 99\), expected \(N = 99\)"),
    "C transposed": (change("C", 99, 7), r"LoraTrf: C is \(99, 7\), expected \(F, N = 99\)"),
    "D transposed": (change("D", 7, 99), r"LoraTrf: D is \(7, 99\), expected \(N = 99, F = 7\)"),
    "F over limit": (
        lambda values: change("D", 99, 1025)(change("C", 1025, 99)(values)),
        r"LoraTrf: C \(1025, 99\) has rank 1025, the kernels take at most 1024",
    ),
    "R over limit": (
        lambda values: change("B", 99, 1025)(change("A", 1025, 19)(values)),
        r"LoraTrf: A \(1025, 19\) has rank 1025",
    ),
    "R is 0": (
        lambda values: change("B", 99, 0)(change("A", 0, 19)(values)),
        r"LoraTrf: A is \(0, 19\), expected \(R, K = 19\)",
    ),
    "other leading dimensions": (change("x", 5, 2, 19), r"x is \(5, 2, 19\), expected the leading dimensions of base"),
    "leading dimensions missing": (change("x", 19), r"LoraTrf: x is \(19\), expected the leading dimensions of base"),
    "scalar base": (change("base"), r"LoraTrf: base is \(\)"),
    "no features": (change("base", 2, 5, 0), r"LoraTrf: base is \(2, 5, 0\)"),
    "weight is a vector": (change("A", 19), r"LoraTrf: A is \(19\), expected \(R, K = 19\)"),
}


@pytest.mark.parametrize("constant", [(), WEIGHTS], ids=["inputs", "constants"])
@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_node(fault, constant):
    spoil, message = HOSTILE[fault]
    values = spoil(values_of("LoraTrf"))
    session = session_of(model_of("LoraTrf", values, constant=constant))
    with pytest.raises(Exception, match=message):
        run(session, values)


@pytest.mark.parametrize("filter_input", ["both", "", "adapted\0", 1, 2.0, "x" * 5000], ids=lambda x: str(x)[:8])
def test_hostile_attribute(filter_input):
    model = model_of("LoraTrf", values_of("LoraTrf"), attributes={"filter_input": filter_input}, functions=False)
    with pytest.raises(Exception, match=r'filter_input is ".*expected "adapted" or "base"'):
        session_of(model)


@pytest.mark.parametrize("name", ["x", "A", "B", "tau", "C", "D"])
def test_hostile_type_mix(name):
    values = values_of("LoraTrf")
    with pytest.raises(Exception, match=r"(?i)type|LoraTrf"):
        run(session_of(model_of("LoraTrf", values, types={name: "float16"}, functions=False)), values)


def test_unknown_instruction_set(monkeypatch):
    monkeypatch.setenv("LORATRF_ISA", "mmx")
    with pytest.raises(Exception, match='LORATRF_ISA is "mmx", which this build or this CPU lacks'):
        session_of(model_of("LowRank", values_of("LowRank")))


def test_instruction_sets_agree(monkeypatch):
    values = values_of("LoraTrf", 40, K=99, N=600)
    model = model_of("LoraTrf", values, constant=WEIGHTS)
    best = run(session_of(model), values)
    monkeypatch.setenv("LORATRF_ISA", "baseline")
    assert_close(run(session_of(model), values), best.astype(np.float64), "float32", "baseline")


@pytest.mark.parametrize("T", [1, 40])
def test_run_time_weights_are_read_anew(T):
    # Another adapter through the same session, of another rank too: nothing of the first may stay.
    values = values_of("LoraTrf", T)
    session = session_of(model_of("LoraTrf", values))
    for seed, R, F in ((0, 4, 7), (1, 4, 7), (2, 33, 1), (3, 1, 64)):
        values = values_of("LoraTrf", T, R=R, F=F, seed=seed)
        expected = expected_of("LoraTrf", values, "float32", "adapted")
        assert_close(run(session, values), expected, "float32", f"adapter {seed}")


def test_overridable_initializers_are_not_packed():
    # Weights that are inputs with a default, as swappable exports have them.
    values = values_of("LowRank", 40)
    proto = ir.from_proto(__import__("onnx").load_from_string(model_of("LowRank", values, constant=("A", "B"))))
    for name in "AB":
        proto.graph.inputs.append(proto.graph.initializers[name])
    session = session_of(ir.to_proto(proto).SerializeToString())
    feeds = {name: values[name] for name in ("base", "x")}
    default = session.run(None, feeds)[0]
    assert_close(default, expected_of("LowRank", values, "float32", ""), "float32", "default")
    other = values | {"B": values["B"] * -2}
    actual = session.run(None, feeds | {"B": other["B"]})[0]
    assert_close(actual, expected_of("LowRank", other, "float32", ""), "float32", "override")


def test_many_threads_at_once():
    values = values_of("LoraTrf", 40, K=99, N=600, R=19)
    for constant in ((), WEIGHTS):
        session = session_of(model_of("LoraTrf", values, constant=constant))
        expected = run(session, values)

        def work(session=session, expected=expected):
            for _ in range(20):
                np.testing.assert_array_equal(run(session, values), expected)

        in_threads(work)


def test_packed_weights_go_with_their_sessions() -> None:
    """They share chunks of memory: one that outlived its session would show as memory that only grows."""
    if "libasan" in Path("/proc/self/maps").read_text():
        pytest.skip("AddressSanitizer keeps what is freed")

    def resident() -> float:  # MB
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6

    # 5 MB in 4 packed weights of odd sizes: some share a chunk, some are larger than one.
    values = values_of("LoraTrf", T=1, K=2111, N=1999, R=301, F=37)
    model = model_of("LoraTrf", values, constant=WEIGHTS)
    expected = run(session_of(model), values)
    kept = session_of(model)  # its blocks lie between those of the others
    for _ in range(3):
        session_of(model)
    before = resident()
    for _ in range(30):
        np.testing.assert_array_equal(run(session_of(model), values), expected)
    assert resident() - before < 60
    np.testing.assert_array_equal(run(kept, values), expected)


PEAK = """
import re, sys
import numpy, onnxruntime as ort
def peak():  # of this program alone: getrusage's carries the parent's over
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
options = ort.SessionOptions()
options.enable_cpu_mem_arena = False
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[2])
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
feeds = {"base": numpy.ones((16384, 1024), numpy.float32), "x": numpy.ones((16384, 1), numpy.float32)}
before = peak()
session.run(None, feeds)
print((peak() - before) / 65536)
"""


def test_reuses_the_buffer_of_base(tmp_path):
    if not Path("/proc/self/status").is_file():
        pytest.skip("no /proc to read the peak memory from")
    # Neg -> LowRank -> ReduceSum over 64 MiB: one such buffer at the peak if y takes base's, two if it doesn't.
    values = {"base": None, "x": None, "A": np.ones((1, 1), np.float32), "B": np.ones((1024, 1), np.float32)}
    arguments = {name: ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in values}
    arguments["base"].shape, arguments["x"].shape = ir.Shape((16384, 1024)), ir.Shape((16384, 1))
    for name in "AB":
        arguments[name].const_value = ir.tensor(values[name], name=name)
    negative = ir.node("Neg", [arguments["base"]])
    node = ir.node("LowRank", [*negative.outputs, *list(arguments.values())[1:]], domain=schemas.DOMAIN)
    total = ir.node("ReduceSum", node.outputs)
    total.outputs[0].name, total.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [arguments["base"], arguments["x"]],
        total.outputs,
        nodes=[negative, node, total],
        initializers=[arguments["A"], arguments["B"]],
        opset_imports={"": OPSET, schemas.DOMAIN: schemas.VERSION},
        name="test",
    )
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model.onnx"), str(LIBRARY)]
    buffers = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 < buffers < 1.5, f"{buffers:.2f} buffers of base's size at the peak"


def test_stays_loaded_when_the_last_session_goes():
    if not Path("/proc/self/maps").is_file():
        pytest.skip("no /proc to see what is loaded")
    code = "import onnxruntime, sys; onnxruntime.SessionOptions().register_custom_ops_library(sys.argv[1]); "
    code += "print(sys.argv[1] in open('/proc/self/maps').read())"
    command = [sys.executable, "-c", code, str(LIBRARY.resolve())]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "True\n"


def test_declared_abi_is_the_official_one(tmp_path):
    folders = [Path(root) / sub for root in ("/usr/include", "/usr/local/include") for sub in ("", "onnxruntime")]
    header = next((folder for folder in folders if (folder / "onnxruntime_c_api.h").is_file()), None)
    if not header:
        pytest.skip("onnxruntime_c_api.h is not installed (Debian 13: libonnxruntime-dev)")
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    check = ROOT / "tests" / "ort_abi_check.cc"
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", f"-I{header}", str(check)], check=True)
