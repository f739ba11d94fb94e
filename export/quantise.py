"""Encoders in 8 bits: linear layers and embedding tables of a finished graph; adapters and heads stay as they are.

ONNX Runtime's own quantiser is not used: it makes constants of every Gemm's weights first, and so drops the inputs of a
swappable model's head; and it takes one scale for all activations of a batch, by which rows disturb each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape
from torch import nn

from ..errors import UserError, some
from ..parity.quantised import WEIGHTS_OF
from .graph import modules_of

__all__ = ["quantisable", "quantise"]

_NARROWEST = 16
"""Rows and columns of a weight that is worth it: what is narrower (a head, token types) is no part of size or time."""

_TOKENS, _LINEAR = 127, 64
"""Largest magnitudes of tokens and of linear layers' weights.

The latter have 7 bits, so that no CPU's sum of two products of 8 by 8 bits is cut at 16 bits: AVX2 has no other
instruction.
"""


def quantise(
    model: ir.Model, saved: Collection[str] = (), patterns: Sequence[str] = (), traced: nn.Module | None = None
) -> list[str]:
    """y ≈ s·w·(round(x/s) Qᵀ): linear layers and embedding tables in int8, in place.

    Modules in `saved` stay, and so do those that match one of `patterns` ("*.layer.0.*", as file names do), which are
    returned.

    Q (N,K) int8 and w (N) float32 are fixed, w = max|W|/64 of each output; s = max|x|/127 is each token's own, taken as
    the model runs, so that an answer doesn't depend on the batch that it is in. Rows of an embedding have a scale each,
    max|row|/127. All of it is standard ONNX. Requires a graph from `finish`; the torch model `traced` tells the layers
    that it doesn't name; weights that are inputs of it stay. Raises UserError where nothing is left to quantise, or a
    pattern matches nothing that would be.
    """
    graph = model.graph
    chosen, kept = _chosen(graph, saved, patterns, _Layers(traced))
    if not chosen:
        raise UserError(
            "--quantize int8 finds nothing to quantise: the model has no linear layer or embedding table in float32 of "
            f"{_NARROWEST} x {_NARROWEST} or more that adapter and --keep-float leave alone. Leave --quantize out."
        )
    maker = _Maker(graph)
    for node, names in chosen.items():
        make = maker.gathered if node.op_type == "Gather" else maker.multiplied
        nodes = make(node)
        for number, new in enumerate(nodes):
            new.name = f"{node.name}/int8_{number}"
            new.metadata_props.update(node.metadata_props)
        last = nodes[-1]
        last.name = f"{node.name}/int8"
        last.metadata_props[WEIGHTS_OF] = ",".join(names)
        last.outputs[0].shape, last.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [node.outputs[0]], [last.outputs[0]])
    for name in [name for name, value in graph.initializers.items() if not value.uses() and not value.is_graph_input()]:
        del graph.initializers[name]
    return kept


def quantisable(
    model: ir.Model, saved: Collection[str] = (), patterns: Sequence[str] = (), traced: nn.Module | None = None
) -> list[tuple[list[str], int]]:
    """The layers that `quantise` would have in int8, those of one product together, with their number of weights."""
    chosen, _ = _chosen(model.graph, saved, patterns, _Layers(traced))
    return [(names, weight.size) for node, names in chosen.items() if (weight := _constant(node)) is not None]


def _chosen(
    graph: ir.Graph, saved: Collection[str], patterns: Sequence[str], layers: _Layers
) -> tuple[dict[ir.Node, list[str]], list[str]]:
    """The nodes to quantise, with their layers; and the layers that `patterns` keep. UserError for one of no use."""
    worth = {node: names for node in graph if (names := _worth_it(node, saved, layers))}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for names in worth.values() for name in names):
            known = some([name for names in worth.values() for name in names])
            raise UserError(
                f"--keep-float {pattern} matches no layer that --quantize int8 quantises. Expected a pattern such as "
                f"'*.layer.0.*', with * for any characters. The layers: {known}."
            )
    stay = {node for node, names in worth.items() if any(fnmatchcase(name, own) for name in names for own in patterns)}
    kept = [name for node in worth if node in stay for name in worth[node]]
    return {node: names for node, names in worth.items() if node not in stay}, kept


class _Layers:
    """The linear layers and tables of a torch model, by path and by weight."""

    def __init__(self, model: nn.Module | None):
        self._known = model is not None
        self._weights = {
            path.removesuffix(".base_layer"): weight.detach()
            for path, module in (model.named_modules() if model is not None else ())
            if (weight := module._parameters.get("weight")) is not None and weight.ndim == 2
        }
        self._paths: dict[bytes, str] = {}

    def of(self, node: ir.Node) -> list[str]:
        """The layers that `node` computes, by its name or, of several packed in one, by their weights; else none."""
        names = modules_of(node)
        if not self._known or (names and all(name in self._weights for name in names)):
            return names
        split = next((user for user in node.outputs[0].consumers() if user.op_type == "Split"), None)
        weight = node.inputs[1].const_value if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if split is None or weight is None:
            return []
        sizes = split.inputs[1].const_value if len(split.inputs) > 1 and split.inputs[1] is not None else None
        whole = weight.numpy()
        where = len(split.outputs) if sizes is None else np.cumsum(sizes.numpy())[:-1]
        self._paths = self._paths or {_digest(value.numpy()): path for path, value in self._weights.items()}
        found = [self._paths.get(_digest(part.T)) for part in np.split(whole, where, axis=1)]
        return [path for path in found if path is not None] if None not in found else []


def _digest(weight: NDArray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(weight).tobytes()).digest()


def _worth_it(node: ir.Node, saved: Collection[str], layers: _Layers) -> list[str]:
    """The modules of a linear layer or embedding of constant weight; none of other nodes, or where one is saved."""
    if node.domain or node.op_type not in ("MatMul", "Gemm", "Gather"):
        return []
    constant = _constant(node)
    if constant is None or len(constant.shape) != 2 or constant.dtype != ir.DataType.FLOAT:
        return []
    if min(constant.shape.numpy()) < _NARROWEST:
        return []
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "axis": 0}
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name != "transB"}
    if any(plain.get(name) != value for name, value in attributes.items()):
        return []
    modules = layers.of(node)
    return [] if any(f"{module}.".startswith(f"{path}.") for module in modules for path in saved) else modules


def _constant(node: ir.Node) -> ir.TensorProtocol | None:
    """The weight of a product or a table, None where it is computed or an input."""
    weight = node.inputs[0 if node.op_type == "Gather" else 1]
    return weight.const_value if weight is not None and not weight.is_graph_input() else None


class _Maker:
    """Makes the nodes that stand for one; what several share, weights or a layer's quantised input, is made once."""

    def __init__(self, graph: ir.Graph):
        self._graph = graph
        self._tokens: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self._last = self._constant("int8.last_axis", np.array([-1]))
        self._one = self._constant("int8.one", np.float32(1))
        self._step = self._constant("int8.step", np.float32(1 / _TOKENS))
        self._tiny = self._constant("int8.tiny", np.float32(_TOKENS) * np.finfo(np.float32).tiny)
        self._middle = self._constant("int8.middle", np.uint8(128))

    def gathered(self, node: ir.Node) -> list[ir.Node]:
        """row = w[id]·Q[id]."""
        table, ids = node.inputs
        assert table is not None
        values, scales = self._quantised(table, 1, _TOKENS, transposed=False)
        tape = Tape()
        rows = tape.op("Cast", [tape.op("Gather", [values, ids])], {"to": ir.DataType.FLOAT})
        tape.op("Mul", [rows, tape.op("Gather", [scales, ids])])
        return list(tape.nodes)

    def multiplied(self, node: ir.Node) -> list[ir.Node]:
        """y = s·w·(q Q) + bias, Q (K,N)."""
        x, weight, *bias = node.inputs
        assert x is not None
        assert weight is not None
        transposed = node.attributes.get_int("transB", 0) == 1
        values, scales = self._quantised(weight, 0, _LINEAR, transposed=transposed)
        tape = Tape()
        if x not in self._tokens:
            self._tokens[x] = self._quantise_tokens(tape, x)
        tokens, sizes = self._tokens[x]
        product = tape.op("Cast", [tape.op("MatMulInteger", [tokens, values, self._middle])], {"to": ir.DataType.FLOAT})
        y = tape.op("Mul", [tape.op("Mul", [product, sizes]), scales])
        if bias:
            tape.op("Add", [y, bias[0]])
        return list(tape.nodes)

    def _quantise_tokens(self, tape: Tape, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """q = round(x/s) + 128, uint8, and s = max|x|/127 of each token."""
        high, low = tape.op("ReduceMax", [x, self._last]), tape.op("ReduceMin", [x, self._last])
        largest = tape.op("Max", [high, tape.op("Neg", [low]), self._tiny])
        sizes = tape.op("Mul", [largest, self._step])
        return tape.op("QuantizeLinear", [tape.op("Div", [x, sizes]), self._one, self._middle]), sizes

    def _quantised(self, weight: ir.Value, axis: int, largest: int, *, transposed: bool) -> tuple[ir.Value, ir.Value]:
        """The initializers of a weight's int8 values and of their scales, one for all along `axis`."""
        name = f"{weight.name}.int8"
        if name not in self._graph.initializers:
            assert weight.const_value is not None
            exact = weight.const_value.numpy()
            exact = exact.T if transposed else exact
            scales = np.abs(exact).max(axis, keepdims=axis == 1) / np.float32(largest)
            scales[scales == 0] = 1
            rounded = np.round(exact / (scales if axis else scales[None]))
            self._constant(name, rounded.astype(np.int8))
            self._constant(f"{name}_scale", scales)
        return self._graph.initializers[name], self._graph.initializers[f"{name}_scale"]

    def _constant(self, name: str, value: NDArray | np.generic) -> ir.Value:
        tensor = ir.Tensor(np.ascontiguousarray(value) if value.ndim else np.asarray(value), name=name)
        made = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(made)
        return made
