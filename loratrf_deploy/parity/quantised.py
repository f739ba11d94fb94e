"""Parity of quantised bases: the graph's own dequantised weights take PyTorch's place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..genai.names import genai_name, linear_nodes
from ..pytorch.oracle import merge_adapter, plain_name
from .figures import Figures
from .result import QUANTISED, Check, Status

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ..adapters.adapter import Adapter
    from ..pytorch.base import BaseModel

__all__ = ["WEIGHTS_OF", "Product", "dequantise_reference", "exact_arithmetic", "products"]

WEIGHTS_OF = "weights_of"
"""The metadata of a node by which an encoder's graph says whose 8-bit weights are in its output: modules, by commas."""

_STEPS = 1.01
"""A quantised weight is at most a step from its own value: half a step by rounding, a whole one at the range's end."""


_MERGED = 0.25
"""How far from its own size a merged adapter may be found in quantised weights, besides what rounding explains."""


def exact_arithmetic(graph: ir.Model) -> bool:
    """Makes quantised products compute in float32 instead of int8, in place; False where nothing is quantised.

    The shipped graph rounds activations to int8 too (accuracy_level 4 of a language model), which would hide an error
    of the adapter.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    blocked = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    for node in blocked:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    whole = products(graph)
    for product in whole:
        _multiply_exactly(graph.graph, product)
    if whole:
        RemoveUnusedNodesPass()(graph)
    return bool(blocked or whole)


@dataclass(frozen=True)
class Product:
    """An encoder's linear layer in int8: y = s·w·(round(x/s) Q), Q `values` (K,N) and w `scales` (N).

    `last` is the node of y, or of y + bias where the graph adds one, and bears the metadata.
    """

    x: ir.Value
    values: ir.Value
    scales: ir.Value
    y: ir.Value
    last: ir.Node


def products(graph: ir.Model) -> list[Product]:
    """Every linear layer in int8 that an export wrote; what only looks like one is left out."""
    found = []
    for last in (node for node in graph.graph if WEIGHTS_OF in node.metadata_props):
        y = last.outputs[0] if last.op_type == "Mul" else _input(last, 0)
        by_output = _maker(y)
        integers = _maker(_input(_maker(_input(_maker(_input(by_output, 0)), 0)), 0))
        x = _input(_maker(_input(_maker(_input(integers, 0)), 0)), 0)
        values, scales = _input(integers, 1), _input(by_output, 1)
        if integers is not None and integers.op_type == "MatMulInteger" and x and values and scales and y:
            found.append(Product(x, values, scales, y, last))
    return found


def _multiply_exactly(graph: ir.Graph, product: Product) -> None:
    """x·(w·Q) in the place of a product in int8, whose nodes lose their reader."""
    import onnx_ir as ir
    from onnx_ir.tape import Tape

    tape = Tape()
    # Not DequantizeLinear, of which ONNX Runtime makes a MatMulNBits that rounds activations again.
    weight = tape.op("Mul", [tape.op("Cast", [product.values], {"to": ir.DataType.FLOAT}), product.scales])
    exact = tape.op("MatMul", [product.x, weight])
    tape.nodes[-1].metadata_props.update(product.last.metadata_props)
    graph.insert_before(product.last, tape.nodes)
    product.y.name, exact.name = exact.name, product.y.name
    product.y.replace_all_uses_with(exact, replace_graph_outputs=True)


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _input(node: ir.Node | None, index: int) -> ir.Value | None:
    return node.inputs[index] if node is not None and index < len(node.inputs) else None


def dequantise_reference(
    graph: ir.Model,
    base: BaseModel,
    adapter: Adapter,
    *,
    merged: bool,
    named: Callable[[str], str] = str,
    saved: bool = True,
) -> Check:
    """Gives the PyTorch model the graph's own dequantised weights, in place; the adapter's stay exact.

    So what the quantisation costs is no error, and an error of the adapter can't hide behind it. With `merged` the
    low-rank halves are in the graph's weights, so they are merged here first. Returns the check that the quantised
    weights are the model's own: each within a step, and the merged adapter in them at its full size. `named` says what
    the graph calls a module; `saved` whether those that the adapter saves whole are in the graph's weights, or beside.
    """
    from ..pytorch.dora import gains_kept

    if merged:
        merge_adapter(base.model)
    with contextlib.nullcontext() if merged else gains_kept(base.model):
        return _dequantise_into(graph, base, adapter, merged, named, saved)


def _dequantise_into(
    graph: ir.Model, base: BaseModel, adapter: Adapter, merged: bool, named: Callable[[str], str], saved: bool
) -> Check:
    import torch

    modules = _base_modules(base, saved)
    weights = _Dequantised(graph, {named(path): len(module.weight) for path, module in modules.items()})
    sums = _WeightSums()
    for path, module in modules.items():
        if found := weights.of(named(path), len(module.weight)):
            layer = adapter.layers.get(path)
            delta = layer.scaled_B() @ layer.A if merged and layer is not None and layer.A is not None else None
            sums.add(path, *found, module.weight.detach().numpy(), delta)
            module.weight = torch.nn.Parameter(torch.from_numpy(found[0]), requires_grad=False)
    if any(node.op_type == "GatherBlockQuantized" for node in graph.graph):
        head = weights.of("lm_head", None)
        assert head is not None  # the builder shares the head's weights with the embedding
        embedding = base.model.get_input_embeddings()
        # What PEFT wrapped it in is merged into it by now: an adapter of the embedding, or single trained tokens.
        for wrapped in ("original_module", "base_layer"):
            embedding = getattr(embedding, wrapped, embedding)
        sums.add("the embedding", *head, embedding.weight.detach().numpy(), None)
        embedding.weight = torch.nn.Parameter(torch.from_numpy(head[0]), requires_grad=False)
    return sums.check()


def _base_modules(base: BaseModel, saved: bool) -> dict[str, torch.nn.Linear | torch.nn.Embedding]:
    """The base's own layers and tables by their paths in it, whatever PEFT wrapped around them."""
    import torch

    return {
        plain_name(name).removesuffix(".base_layer").removesuffix(".token_adapter"): module
        for name, module in base.model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
        and not any(part in name for part in _NOT_BASE)
        and (saved or ".modules_to_save." not in name)
    }


_NOT_BASE = (".original_module", ".lora_", ".trf_")


class _Dequantised:
    """The float32 weights (N,K) of a graph's quantised layers, and their steps, by torch module.

    Of a language model's MatMulNBits nodes, and of the products that `exact_arithmetic` made of an encoder's.
    """

    def __init__(self, graph: ir.Model, rows: Mapping[str, int]):
        """`rows` are the N of the torch model's layers, by path."""
        self._nodes = {name: node for name, (node, _) in linear_nodes(graph.graph).items()}
        self._whole: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for node in graph.graph:
            names = node.metadata_props.get(WEIGHTS_OF, "").split(",")
            counts = [rows.get(name, 0) for name in names]
            if (found := _dequantise_whole(node)) and sum(counts) == len(found[0]):
                ends = np.cumsum(counts)[:-1]
                parts = zip(*(np.split(values, ends) for values in found), strict=True)
                self._whole |= {name: (value, step) for name, (value, step) in zip(names, parts, strict=True)}

    def of(self, path: str, rows: int | None) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """(weights, steps), both (N,K), of the module at `path` with N = `rows`; None where it isn't quantised.

        The builder stacks q, k and v into one, and cuts Phi-3's gate_up_proj in two; an encoder's exporter stacks what
        has the same input.
        """
        if found := self._whole.get(path):
            return found
        name = genai_name(path) or ""
        group, _, last = name.rpartition("/")
        if name in self._nodes:
            return _dequantise(self._nodes[name])
        if last in ("q_proj", "k_proj", "v_proj") and rows and (stacked := self._nodes.get(f"{group}/qkv_proj")):
            found = _dequantise(stacked)
            total = len(found[0]) if found else 0
            begin = {"q_proj": 0, "k_proj": total - 2 * rows, "v_proj": total - rows}[last]
            return found and (found[0][begin : begin + rows].copy(), found[1][begin : begin + rows])
        halves = [self._nodes.get(f"{group}/{half}") for half in ("gate_proj", "up_proj")]
        if last == "gate_up_proj" and all(halves):
            found_halves = [_dequantise(half) for half in halves if half is not None]
            if all(found_halves):
                values, steps = zip(*(half for half in found_halves if half), strict=True)
                return np.concatenate(values), np.concatenate(steps)
        return None


def _dequantise(node: ir.Node) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """MatMulNBits: w = (q - zero) · scale in blocks along K, q packed low nibble first; None for a plain MatMul."""
    if node.op_type != "MatMulNBits":
        return None
    K, N, bits, block = (node.attributes[name].as_int() for name in ("K", "N", "bits", "block_size"))
    blocks = -(-K // block)

    def stored(index: int) -> NDArray[Any] | None:
        value = node.inputs[index] if index < len(node.inputs) else None
        return None if value is None or value.const_value is None else value.const_value.numpy()

    def unpacked(packed: NDArray[Any], columns: int) -> NDArray[np.float32]:
        packed = packed.reshape(N, -1)
        if bits == 4:
            packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(N, -1)
        return packed[:, :columns].astype(np.float32)

    q, scales, zeros = stored(1), stored(2), stored(3)
    assert q is not None
    assert scales is not None
    step = np.repeat(scales.astype(np.float32).reshape(N, blocks), block, axis=1)[:, :K]
    zero: Any = float(1 << (bits - 1))
    if zeros is not None:
        zero = np.repeat(unpacked(zeros, blocks), block, axis=1)[:, :K]
    value = unpacked(q, blocks * block)[:, :K]
    value -= zero
    value *= step
    return value, np.abs(step)


def _dequantise_whole(node: ir.Node) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """w·Q (N,K) of the encoder's layer or table that ends at `node`, and its steps; None where it is neither.

    A layer's weights lie there transposed, (K,N), with a scale for each column; a table's, with one for each row.
    """
    if WEIGHTS_OF not in node.metadata_props or node.op_type not in ("MatMul", "Mul"):
        return None
    linear = node.op_type == "MatMul"
    maker = _maker(node.inputs[1])
    if linear:
        values, scales = _input(_maker(_input(maker, 0)), 0), _input(maker, 1)
    else:
        values, scales = _input(_maker(_input(_maker(node.inputs[0]), 0)), 0), _input(maker, 0)
    if values is None or values.const_value is None or scales is None or scales.const_value is None:
        return None
    steps = np.broadcast_to(scales.const_value.numpy(), values.const_value.shape.numpy())
    exact = values.const_value.numpy().astype(np.float32) * steps
    return (np.ascontiguousarray(exact.T), steps.T) if linear else (exact, steps)


class _WeightSums:
    """Collects, layer by layer, how far quantised weights are from those that they stand for."""

    def __init__(self) -> None:
        self.steps, self.absolute, self.largest, self.where, self.values = 0.0, 0.0, 0.0, "", 0
        self.error_delta = self.delta_delta = self.variance = 0.0

    def add(
        self,
        path: str,
        value: NDArray[np.float32],
        step: NDArray[np.float32],
        own: NDArray[np.float32],
        delta: NDArray[np.float32] | None,
    ) -> None:
        error = value - own
        steps = float((np.abs(error) / np.maximum(step, np.finfo(np.float32).tiny)).max())
        if steps > self.steps:
            self.steps, self.where = steps, path
        self.absolute = max(self.absolute, float(np.abs(error).max()))
        self.largest = max(self.largest, float(np.abs(own).max()))
        self.values += value.size
        if delta is not None:
            self.error_delta += float(np.vdot(error, delta))
            self.delta_delta += float(np.vdot(delta, delta))
            self.variance += float(np.vdot(step * delta, step * delta)) / 12

    def check(self) -> Check:
        reason = f"quantised weights are within {self.steps:.2f} steps of their own values"
        status: Status = "passed" if self.steps <= _STEPS else "failed"
        if status == "failed":
            reason += f", expected 1 (worst: {self.where})"
        if self.delta_delta:
            # A rounding error is no multiple of the adapter, so their projection on it tells whether it is in there.
            size = 1 + self.error_delta / self.delta_delta
            doubt = 3 * self.variance**0.5 / self.delta_delta
            reason += f"; the merged adapter is in them at {size:.3f} (± {doubt:.3f}) of its size"
            if not abs(size - 1) <= _MERGED + doubt:
                status = "failed"
        relative = self.absolute / self.largest if self.largest else 0.0
        figures = Figures(self.absolute, relative, float("nan"), None, 0, 0, self.values)
        return Check(QUANTISED, "weights", status, reason, figures)
