"""The one table of operators: domain, inputs, attributes, and each operator's definition in standard ONNX ops.

Exporter, session, reference tests and the C++ registration test all read `OPS`. A definition travels inside every
exported model as a model-local function: ONNX Runtime inlines it where the custom-op library is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from .reference import EPSILON

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = [
    "ADAPTER_IDS",
    "DOMAIN",
    "FILTER_INPUTS",
    "FUNCTIONS",
    "IDS",
    "MAX_CUDA_RANK",
    "MAX_RANK",
    "OPERATOR",
    "OPS",
    "VERSION",
    "Device",
    "FilterInput",
    "OpSchema",
    "function_body",
]

DOMAIN = "com.loratrf"
VERSION = 1
OPERATOR = "operator"
"""The metadata of the node that gives what an operator gave, where its definition stands in its place."""
Device = Literal["cpu", "cuda"]
"""Where the kernels run."""
FilterInput = Literal["adapted", "base"]
FILTER_INPUTS: tuple[FilterInput, ...] = get_args(FilterInput)
ADAPTER_IDS = "adapter_ids"
"""The input that says which slot each batch row uses: of the grouped operators, and of a grouped model's graph."""
MAX_RANK = 1024
"""Highest rank and filter rank that the kernels take."""
MAX_CUDA_RANK = 256
"""The same on CUDA, where a block's shared memory is the limit."""


@dataclass(frozen=True)
class OpSchema:
    """An operator's name, inputs in order, and string attributes with their defaults. Its meaning: `reference`.

    All inputs are of one type but ids and adapter_ids, which are int64.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: dict[str, str]


OPS: dict[str, OpSchema] = {
    schema.name: schema
    for schema in (
        OpSchema("LowRank", ("base", "x", "A", "B"), {}),
        OpSchema("TaskFilter", ("z", "tau", "C", "D"), {}),
        OpSchema(
            "LoraTrf",
            ("base", "x", "A", "B", "tau", "C", "D"),
            {"filter_input": "adapted"},
        ),
        # Weights have a leading S. A layer without a low-rank half has R = 0, one without a filter F = 0.
        OpSchema(
            "GroupedLoraTrf",
            ("base", "x", "A", "B", "tau", "C", "D", ADAPTER_IDS),
            {"filter_input": "adapted"},
        ),
    )
}
"""What the custom-op library runs as kernels."""

IDS = "ids"
"""The input of the operators of an embedding table that says which of its rows are looked up."""
FUNCTIONS: dict[str, OpSchema] = OPS | {
    schema.name: schema
    for schema in (
        OpSchema("GroupedLinear", ("base", "x", "W", "b", ADAPTER_IDS), {}),
        OpSchema("LowRankEmbedding", ("base", IDS, "A", "B"), {}),
        OpSchema("GroupedLowRankEmbedding", ("base", IDS, "A", "B", ADAPTER_IDS), {}),
    )
}
"""The operators, and what is a function only, since it costs next to nothing.

GroupedLinear, a head per adapter: y[row] = x W[id]ᵀ + b[id] with id = adapter_ids[row], W (S,N,K), b (S,N); base[row]
for id -1. LowRankEmbedding: y = base + (A[:, ids])ᵀ Bᵀ with A (R,V) of a table of V rows, base (T,N) and ids (T);
grouped with a leading S on A and B. An id that the table has no row for is its own lookup's to refuse.
"""


def function_body(op: str, opset: int, filter_input: str = "adapted") -> ir.Function:
    """The operator `op` as an ONNX function in standard ops of `opset` (18 or later).

    Like the kernels it computes in float32 whatever the inputs' type and rounds once, at the end; the casts vanish for
    float32. A function can't branch on a string attribute without a run-time If, so the body of LoraTrf is made for one
    `filter_input`; all nodes of one model share it (it is one setting of the adapter).
    """
    import onnx_ir as ir

    schema = FUNCTIONS[op]
    if filter_input not in FILTER_INPUTS:
        raise ValueError(f"filter_input is {filter_input!r}, expected one of {FILTER_INPUTS}")
    body = _Body()
    inputs = {name: ir.Value(name=name) for name in schema.inputs}
    if ADAPTER_IDS in inputs:
        output = body.by_row(inputs, filter_input)
    else:
        w = {name: body.wide(value) for name, value in body.without_table(inputs).items()}
        result = body.adapted(w, filter_input)
        output = body.op("CastLike", result, inputs[schema.inputs[0]])
    output.name = "y"
    graph = ir.Graph(list(inputs.values()), [output], nodes=body.nodes, opset_imports={"": opset})
    attributes = [ir.Attr(name, ir.AttributeType.STRING, None) for name in schema.attributes]
    return ir.Function(DOMAIN, op, graph=graph, attributes=attributes)


_WEIGHTS = ("A", "B", "tau", "C", "D", "W", "b")


class _Body:
    """Collects the nodes of one function body."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.transposed = [1, 0]  # of a weight; one more axis where each batch row has its own

    def op(self, op_type: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        import onnx_ir as ir

        node = ir.node(op_type, list(inputs), attributes=attributes)  # type: ignore[arg-type]
        node.outputs[0].name = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, value: float | int | list[int]) -> ir.Value:
        if isinstance(value, list):
            return self.op("Constant", value_ints=value)
        if isinstance(value, int):
            return self.op("Constant", value_int=value)
        return self.op("Constant", value_float=value)

    def wide(self, value: ir.Value) -> ir.Value:
        import onnx_ir as ir

        return self.op("Cast", value, to=ir.DataType.FLOAT)

    def adapted(self, w: dict[str, ir.Value], filter_input: str) -> ir.Value:
        """What the inputs in `w` make: the low-rank half, the filter, or both."""
        if "tau" not in w:
            return self.low_rank(w["base"], w)
        if "A" not in w:
            return self.task_filter(w["z"], w)
        if filter_input == "adapted":
            return self.task_filter(self.low_rank(w["base"], w), w)
        # out = h + filter term of base: the same two steps in the other order.
        return self.low_rank(self.task_filter(w["base"], w), w)

    def without_table(self, inputs: dict[str, ir.Value]) -> dict[str, ir.Value]:
        """`inputs`; of an embedding table with its columns of A (T,R) as "low", in the place of A and ids."""
        if IDS not in inputs:
            return inputs
        low = self.looked_up(inputs["A"], self.op("Unsqueeze", inputs[IDS], self.constant([-1])))
        return {"base": inputs["base"], "low": low, "B": inputs["B"]}

    def looked_up(self, A: ir.Value, ids: ir.Value, slots: ir.Value | None = None) -> ir.Value:
        """A[:, id] for each of `ids` (T,1), (T,R); A[slot][:, id] for ids (rows,T,1) and `slots` (rows).

        From A as it lies in memory: neither turned nor copied, since it is as long as the vocabulary.
        """
        shape = self.op("Shape", A)
        rank, rows = (self.op("Gather", shape, self.constant(axis)) for axis in (-2, -1))
        columns = self.op("Mul", self.op("Range", self.constant(0), rank, self.constant(1)), rows)
        places = self.op("Add", ids, columns)
        if slots is not None:
            begins = self.op("Mul", slots, self.op("Mul", rank, rows))
            places = self.op("Add", places, self.op("Unsqueeze", begins, self.constant([1, 2])))
        return self.op("Gather", self.op("Reshape", A, self.constant([-1])), places)

    def by_row(self, inputs: dict[str, ir.Value], filter_input: str) -> ir.Value:
        """The rows that have an adapter, each with its own slot's weights, put in the place of theirs in base."""
        batch = self.op("Slice", self.op("Shape", inputs["base"]), self.constant([0]), self.constant([1]))
        # Fails where there isn't one id per row: rows without any would pass for the base's.
        ids = self.op("Reshape", inputs[ADAPTER_IDS], batch, allowzero=1)
        named = self.op("Not", self.op("Equal", ids, self.constant(-1)))
        rows = self.op("Squeeze", self.op("NonZero", named), self.constant([0]))
        chosen = self.op("Gather", ids, rows)
        # Gather counts negative indices from the end: ids below -1 must be an error, not another adapter.
        slots = self.op("Where", self.op("Less", chosen, self.constant(0)), self.constant(2**62), chosen)
        base = self.by_tokens(inputs["base"])
        table = IDS in inputs
        own = [name for name in inputs if name in _WEIGHTS and not (table and name == "A")]
        w = {name: self.op("Gather", inputs[name], slots, axis=0) for name in own}
        if table:
            # The Gather of B fails for a slot that isn't there, so a wrong place in A reaches nobody.
            tokens = self.by_tokens(self.op("Unsqueeze", inputs[IDS], self.constant([-1])))
            w["low"] = self.looked_up(inputs["A"], self.op("Gather", tokens, rows, axis=0), chosen)
        else:
            w["x"] = self.op("Gather", self.by_tokens(inputs["x"]), rows, axis=0)
        w["base"] = self.op("Gather", base, rows, axis=0)
        w = {name: self.wide(value) for name, value in w.items()}
        self.transposed = [0, 2, 1]
        for name in ("tau", "b"):
            if name in w:  # (rows, N), for all tokens of a row
                w[name] = self.op("Unsqueeze", w[name], self.constant([1]))
        if "W" in w:
            result = self.op("Add", self.times_transposed(w["x"], w["W"]), w["b"])
        else:
            result = self.adapted(w, filter_input)
        updates = self.op("CastLike", result, base)
        merged = self.op("ScatterND", base, self.op("Unsqueeze", rows, self.constant([1])), updates)
        return self.op("Reshape", merged, self.op("Shape", inputs["base"]), allowzero=1)

    def by_tokens(self, value: ir.Value) -> ir.Value:
        """(batch, ..., N) as (batch, tokens, N); written for sizes of 0 too, where -1 can't be inferred."""
        shape = self.op("Shape", value)
        batch, features = (self.op("Gather", shape, self.constant([axis])) for axis in (0, -1))
        middle = self.op("Slice", shape, self.constant([1]), self.constant([-1]))
        # Reducing nothing is not 1 everywhere.
        tokens = self.op("ReduceProd", self.op("Concat", self.constant([1]), middle, axis=0), keepdims=1)
        return self.op("Reshape", value, self.op("Concat", batch, tokens, features, axis=0), allowzero=1)

    def times_transposed(self, x: ir.Value, weight: ir.Value) -> ir.Value:
        return self.op("MatMul", x, self.op("Transpose", weight, perm=self.transposed))

    def low_rank(self, base: ir.Value, w: dict[str, ir.Value]) -> ir.Value:
        low = w["low"] if "low" in w else self.times_transposed(w["x"], w["A"])
        return self.op("Add", base, self.times_transposed(low, w["B"]))

    def norm(self, value: ir.Value) -> ir.Value:
        squares = self.op("ReduceSum", self.op("Mul", value, value), self.constant([-1]), keepdims=1)
        return self.op("Clip", self.op("Sqrt", squares), self.constant(EPSILON))  # WebGPU has no Max

    def task_filter(self, z: ir.Value, w: dict[str, ir.Value]) -> ir.Value:
        dot = self.op("ReduceSum", self.op("Mul", z, w["tau"]), self.constant([-1]), keepdims=1)
        cosine = self.op("Div", dot, self.op("Mul", self.norm(z), self.norm(w["tau"])))
        score = self.op("Clip", cosine, self.constant(0.0), self.constant(1.0))
        # s·(z Cᵀ) is (s·z) Cᵀ with N/F times fewer multiplications.
        filtered = self.op("Mul", self.times_transposed(z, w["C"]), score)
        return self.op("Add", z, self.times_transposed(filtered, w["D"]))
