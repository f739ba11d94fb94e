"""Operators behind the products of a graph that onnxruntime-genai's builder made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..errors import UserError
from ..formats.swappable import LAYER_PARTS, TABLE_PARTS
from ..genai.names import genai_name, linear_nodes, table_nodes
from ..ops.dtypes import NUMPY
from ..ops.schemas import ADAPTER_IDS, DOMAIN, FUNCTIONS, IDS, VERSION, function_body
from .adapted import op_of

__all__ = ["insert", "put_behind"]


def insert(
    model: ir.Model,
    rest: Mapping[str, Mapping[str, NDArray[np.float32]]],
    filter_input: str,
    dtype: str,
    biases: Mapping[str, NDArray[np.float32]] = MappingProxyType({}),
    tables: Collection[str] = (),
) -> None:
    """Puts one operator behind each linear layer of `rest`, in place. Requires a graph from `build_graph`. The rules:

    1. A module is found by the builder's name for it; its output is that of its bias's Add, else of its MatMul
       (MatMulNBits where quantised). Whatever read that output, graph outputs included, reads the operator's.
    2. Weights (K,N) there and A (R,K), B (N,R), tau (N) here must agree: a packed or cut projection doesn't. Weights
       with slots, (S, ...), make a grouped operator, which is left without its last input, adapter_ids.
    3. Every module must be found; otherwise an error names all that aren't, and nothing was changed.
    4. Each operator that occurs gets its definition in standard ops as a model-local function.
    5. A gain and an offset (N) of the layer are a Mul and an Add before its operator.
    6. `biases` (N) are of layers without one: an Add each, which the operator of the layer then stands behind.
    7. The operator of one of `tables` (embeddings) stands behind the node that looks its rows up, before a scale.
    """
    nodes = linear_nodes(model.graph) | {name: (node, node) for name, node in table_nodes(model.graph).items()}
    places = {path: nodes.get(genai_name(path) or "") for path in {**rest, **biases}}
    wanted: dict[str, Mapping[str, NDArray[Any]]] = {path: {"tau": bias} for path, bias in biases.items()} | {**rest}
    lost = [path for path, place in places.items() if place is None or not _agrees(place[0], wanted[path])]
    if lost:
        raise UserError(
            f"onnxruntime-genai's builder leaves no layer of its own for {', '.join(lost[:5])}"
            f"{f' and {len(lost) - 5} more' if len(lost) > 5 else ''}: it fuses them with others or builds them as "
            "something else, so no operator can stand behind them. Export merged (--mode merged), which needs none "
            "for plain LoRA, choose another --dtype, or train the adapter without these modules."
        )
    for path, place in places.items():
        assert place is not None
        matmul, last = place
        if path in biases:
            last = _add_bias(model.graph, path, biases[path], matmul, dtype)
        if path in rest:
            op = op_of(rest[path], embedding=path in tables)
            _insert_one(model.graph, path, rest[path], (matmul, last), op, filter_input, dtype)
    opset = model.opset_imports[""]
    for op in sorted({op_of(weights, embedding=path in tables) for path, weights in rest.items()}):
        function = function_body(op, opset, filter_input)
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = VERSION


def _agrees(matmul: ir.Node, weights: Mapping[str, NDArray[Any]]) -> bool:
    if matmul.op_type == "GatherBlockQuantized":
        return True  # it has the head's weights, as that keeps them
    if matmul.op_type == "MatMulNBits":
        ins, outs = (matmul.attributes[name].as_int() for name in ("K", "N"))
    else:
        weight = matmul.inputs[0 if matmul.op_type == "Gather" else 1]
        shape = weight.shape if weight is not None else None
        if shape is None:
            return False
        ins, outs = shape.numpy()
    sizes = {"A": (-1, ins), "B": (-2, outs), "tau": (-1, outs), "gain": (-1, outs)}
    return all(weights[name].shape[axis] == size for name, (axis, size) in sizes.items() if name in weights)


def _add_bias(graph: ir.Graph, path: str, bias: NDArray[np.float32], matmul: ir.Node, dtype: str) -> ir.Node:
    """The Add behind the `matmul` of a layer that had no bias, named as the builder's own are."""
    value = _constant(graph, f"{path}.bias", np.ascontiguousarray(bias, dtype=NUMPY[dtype]))
    node = ir.node("Add", [matmul.outputs[0], value], name=f"{(matmul.name or '').rpartition('/')[0]}/Add")
    node.metadata_props.update(matmul.metadata_props)
    matmul.metadata_props.pop("module", None)
    put_behind(graph, matmul, node, f"{path}.matmul.output", f"{path}.base_layer.bias.output")
    return node


def _insert_one(
    graph: ir.Graph,
    path: str,
    weights: Mapping[str, NDArray[np.float32]],
    place: tuple[ir.Node, ir.Node],
    op: str,
    filter_input: str,
    dtype: str,
) -> None:
    matmul, last = place
    values: dict[str, Any] = {}
    for name, array in weights.items():
        own = np.ascontiguousarray(array, dtype=NUMPY[dtype])
        stored = (TABLE_PARTS if IDS in FUNCTIONS[op].inputs else LAYER_PARTS)[name]
        values[name] = _constant(graph, f"{path}.{stored}", own)
    for part, op_type in (("gain", "Mul"), ("offset", "Add")):
        if part in values:
            node = ir.node(op_type, [last.outputs[0], values[part]], name=f"{path}/{op_type}")
            put_behind(graph, last, node, f"{path}.{op_type}.input", f"{path}.{op_type}.output")
            last = node
    hidden = last.outputs[0]
    # Of a Gather the first input is the table, and the second the ids.
    values |= {"base": hidden, "z": hidden, "x": matmul.inputs[0], IDS: matmul.inputs[1]}
    node = ir.node(
        op,
        [values[name] for name in FUNCTIONS[op].inputs if name != ADAPTER_IDS],
        attributes={"filter_input": filter_input} if FUNCTIONS[op].attributes else {},
        domain=DOMAIN,
        version=VERSION,
        name=f"{path}/{op}",
    )
    node.metadata_props["module"] = path
    put_behind(graph, last, node, f"{path}.base_layer.output", f"{path}.output")


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def put_behind(graph: ir.Graph, last: ir.Node, node: ir.Node, inner: str, outer: str) -> None:
    """Whoever read the output of `last` reads that of `node`, named `outer`. A graph output keeps its name: that of
    `last` is `inner` then."""
    hidden, output = last.outputs[0], node.outputs[0]
    readers = [(reader, index) for reader, index in hidden.uses() if reader is not node]
    output.name, output.shape, output.type = outer, hidden.shape, hidden.type
    for reader, index in readers:
        reader.replace_input_with(index, output)
    graph.insert_after(last, node)
    for index, value in enumerate(graph.outputs):
        if value is hidden:
            hidden.name, output.name = inner, hidden.name
            graph.outputs[index] = output
