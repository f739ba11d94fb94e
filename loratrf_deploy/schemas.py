"""The one table of operators: domain, inputs, attributes, and each operator's definition in standard ONNX ops.

Exporter, session, reference tests and the C++ registration test all read `OPS`. A definition travels inside every
exported model as a model-local function: ONNX Runtime inlines it where the custom-op library is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .reference import EPSILON

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["DOMAIN", "FILTER_INPUTS", "MAX_RANK", "OPS", "TYPES", "VERSION", "OpSchema", "function_body"]

DOMAIN = "com.loratrf"
VERSION = 1
TYPES = ("float32", "float16", "bfloat16")
FILTER_INPUTS = ("adapted", "base")
MAX_RANK = 1024
"""Highest rank and filter rank that the kernels take."""


@dataclass(frozen=True)
class OpSchema:
    """An operator's name, inputs in order (all of one type), string attributes with their defaults, and formula."""

    name: str
    inputs: tuple[str, ...]
    attributes: dict[str, str]
    formula: str


OPS: dict[str, OpSchema] = {
    schema.name: schema
    for schema in (
        OpSchema("LowRank", ("base", "x", "A", "B"), {}, "y = base + (x Aᵀ) Bᵀ"),
        OpSchema("TaskFilter", ("z", "tau", "C", "D"), {}, "y = z + ((s·z) Cᵀ) Dᵀ"),
        OpSchema(
            "LoraTrf",
            ("base", "x", "A", "B", "tau", "C", "D"),
            {"filter_input": "adapted"},
            "h = base + (x Aᵀ) Bᵀ; z = h if adapted, base if base; y = h + ((s·z) Cᵀ) Dᵀ",
        ),
    )
}


def function_body(op: str, opset: int, filter_input: str = "adapted") -> ir.Function:
    """The operator `op` as an ONNX function in standard ops of `opset` (18 or later).

    Like the kernels it computes in float32 whatever the inputs' type and rounds once, at the end; the casts vanish for
    float32. A function can't branch on a string attribute without a run-time If, so the body of LoraTrf is made for one
    `filter_input`; all nodes of one model share it (it is one setting of the adapter).
    """
    import onnx_ir as ir

    schema = OPS[op]
    if filter_input not in FILTER_INPUTS:
        raise ValueError(f"filter_input is {filter_input!r}, expected one of {FILTER_INPUTS}")
    body = _Body()
    inputs = {name: ir.Value(name=name) for name in schema.inputs}
    wide = {name: body.op("Cast", value, to=ir.DataType.FLOAT) for name, value in inputs.items()}
    if op == "LowRank":
        result = body.low_rank(wide["base"], wide)
    elif op == "TaskFilter":
        result = body.task_filter(wide["z"], wide)
    elif filter_input == "adapted":
        result = body.task_filter(body.low_rank(wide["base"], wide), wide)
    else:
        # out = h + filter term of base: the same two steps in the other order.
        result = body.low_rank(body.task_filter(wide["base"], wide), wide)
    output = body.op("CastLike", result, inputs[schema.inputs[0]])
    output.name = "y"
    graph = ir.Graph(list(inputs.values()), [output], nodes=body.nodes, opset_imports={"": opset})
    attributes = [ir.Attr(name, ir.AttributeType.STRING, None) for name in schema.attributes]
    return ir.Function(DOMAIN, op, graph=graph, attributes=attributes)


class _Body:
    """Collects the nodes of one function body."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []

    def op(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(op_type, list(inputs), attributes=attributes)  # type: ignore[arg-type]
        node.outputs[0].name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: float | list[int]) -> ir.Value:
        if isinstance(value, list):
            return self.op("Constant", value_ints=value)
        return self.op("Constant", value_float=value)

    def times_transposed(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        return self.op("MatMul", x, self.op("Transpose", weight, perm=[1, 0]))

    def low_rank(self, base: ir.Value, w: dict[str, ir.Value]) -> ir.Value:
        return self.op("Add", base, self.times_transposed(self.times_transposed(w["x"], w["A"]), w["B"]))

    def norm(self, value: ir.Value) -> ir.Value:
        squares = self.op("ReduceSum", self.op("Mul", value, value), self.constant([-1]), keepdims=1)
        return self.op("Max", self.op("Sqrt", squares), self.constant(EPSILON))

    def task_filter(self, z: ir.Value, w: dict[str, ir.Value]) -> ir.Value:
        dot = self.op("ReduceSum", self.op("Mul", z, w["tau"]), self.constant([-1]), keepdims=1)
        cosine = self.op("Div", dot, self.op("Mul", self.norm(z), self.norm(w["tau"])))
        score = self.op("Clip", cosine, self.constant(0.0), self.constant(1.0))
        # s·(z Cᵀ) is (s·z) Cᵀ with N/F times fewer multiplications.
        filtered = self.op("Mul", self.times_transposed(z, w["C"]), score)
        return self.op("Add", z, self.times_transposed(filtered, w["D"]))
