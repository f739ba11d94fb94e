"""The operators, for every test of them: inputs, the reference's answer, and models of one node for ONNX Runtime."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from loratrf_deploy import UserError, library_path
from loratrf_deploy.ops import reference, schemas

OPSET = 20
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
WEIGHTS = ("A", "B", "tau", "C", "D")
CASES = [("LowRank", "adapted"), ("TaskFilter", "adapted"), ("LoraTrf", "adapted"), ("LoraTrf", "base")]
"""(operator, filter_input) of one adapter."""
GROUPED_CASES = [("GroupedLoraTrf", "adapted"), ("GroupedLoraTrf", "base")]
FUNCTIONS = {
    "LowRank": "low_rank",
    "TaskFilter": "task_filter",
    "LoraTrf": "lora_trf",
    "GroupedLoraTrf": "grouped_lora_trf",
}
"""An operator's function in the reference and in torch.ops.loratrf."""


def values_of(op, T=(2, 5), K=19, N=99, R=4, F=7, seed=0, S=3):
    """{name: float32} of a call, in which every term counts.

    The first token and about half of the others pass the filter; adapter_ids go through all slots, and none.
    """
    rng = np.random.default_rng(seed)
    lead = T if isinstance(T, tuple) else (T,)

    def normal(*shape):
        return rng.standard_normal(shape) / (shape[-1] or 1) ** 0.5

    slots = (S,) if op == "GroupedLoraTrf" else ()
    values = {"x": rng.standard_normal((*lead, K)), "A": normal(*slots, R, K), "B": normal(*slots, N, R)}
    values |= {"C": normal(*slots, F, N), "D": normal(*slots, N, F)}
    task, along = rng.standard_normal(N), rng.uniform(-1, 1, (*lead, 1))
    along.flat[:1] = 1
    values["tau"] = task + 0.3 * rng.standard_normal((S, N)) if slots else task
    values["base"] = values["z"] = rng.standard_normal((*lead, N)) + task * along
    ids = {"adapter_ids": np.arange(*lead[:1], dtype=np.int64)[::-1] % (S + 1) - 1} if lead else {}
    return {name: ids[name] if name in ids else values[name].astype(np.float32) for name in schemas.OPS[op].inputs}


def attributes_of(op, filter_input):
    return {"filter_input": filter_input} if schemas.OPS[op].attributes else {}


def wide(value):
    """An array or a torch tensor as float64; ids as they are."""
    if hasattr(value, "cpu"):
        value = (value.double() if value.is_floating_point() else value).cpu().numpy()
    return value if value.dtype == np.int64 else value.astype(np.float64)


def reference_of(op, inputs, filter_input="adapted"):
    """float64, from inputs in the operator's order, as they are rounded already."""
    return getattr(reference, FUNCTIONS[op])(*map(wide, inputs), **attributes_of(op, filter_input))


def expected_of(op, values, dtype, filter_input):
    """The reference's answer to values_of() rounded to `dtype`."""
    return reference_of(
        op, [v if v.dtype == np.int64 else v.astype(TYPES[dtype]) for v in values.values()], filter_input
    )


def in_threads(work, count=4):
    """Runs `work` in threads at once; what it raises fails the test."""
    faults = []

    def guarded():
        try:
            work()
        except Exception as error:
            faults.append(error)

    workers = [threading.Thread(target=guarded) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not faults


def built_library():
    """The custom-op library's path; skips where it is not built."""
    try:
        return library_path()
    except UserError:
        pytest.skip("libloratrf_ort.so is not built", allow_module_level=True)


def cpu_has():
    """What /proc/cpuinfo says that this CPU can run, by our names; None where it says nothing of them."""
    try:
        line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return None
    avx2 = {"avx2", "fma", "f16c"}
    needed = {"baseline": set(), "avx2": avx2, "avx512": avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    return [name for name, flags in needed.items() if flags <= set(line.split())]


def built_kernels():
    """loratrf_deploy.ops.kernels; skips where the library is not built."""
    built_library()
    return importlib.import_module("loratrf_deploy.ops.kernels")


def model_of(op, values, dtype="float32", constant=(), attributes=None, functions=True, types=None, shapes=None):
    """Float32 inputs, cast to dtype, one node, its result cast back; inputs that `shapes` lacks are of any shape."""
    ir = pytest.importorskip("onnx_ir")
    onnx_types = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
    types, shapes = types or {}, shapes or {}
    inputs, initializers, nodes, arguments = [], [], [], []
    for name, value in values.items():
        named = types.get(name, dtype)
        if name in constant:
            tensor = ir.tensor(value.astype(TYPES[named]), dtype=onnx_types[named], name=name)
            arguments.append(ir.Value(name=name, const_value=tensor))
            initializers.append(arguments[-1])
            continue
        ids = name == "adapter_ids" and name not in types
        given = ir.TensorType(ir.DataType.INT64 if ids else ir.DataType.FLOAT)
        inputs.append(ir.Value(name=name, type=given, shape=shapes.get(name)))
        arguments.append(inputs[-1])
        if not ids:
            nodes.append(ir.node("Cast", [inputs[-1]], attributes={"to": onnx_types[named]}))
            arguments[-1] = nodes[-1].outputs[0]
            arguments[-1].name = f"{name}_cast"
    nodes.append(ir.node(op, arguments, attributes=attributes or {}, domain=schemas.DOMAIN))
    nodes.append(ir.node("Cast", nodes[-1].outputs, attributes={"to": ir.DataType.FLOAT}))
    (y,) = nodes[-1].outputs
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    imports = {"": OPSET, schemas.DOMAIN: schemas.VERSION}
    graph = ir.Graph(inputs, [y], nodes=nodes, initializers=initializers, opset_imports=imports, name="test")
    filter_input = (attributes or {}).get("filter_input", "adapted")
    bodies = [schemas.function_body(op, OPSET, filter_input)] if functions else []
    return ir.to_proto(ir.Model(graph, ir_version=10, functions=bodies)).SerializeToString()


def session_of(model, library=True, threads=2):
    """Of a model in memory; `library` is whether ours is registered, or the path of another."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(str(built_library() if library is True else library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(session, values):
    """The one output; what became a constant is left out of the feeds."""
    names = {value.name for value in session.get_inputs()}
    return session.run(None, {name: value for name, value in values.items() if name in names})[0]
