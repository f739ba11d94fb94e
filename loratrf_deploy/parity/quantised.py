"""Parity of quantised bases: the graph's own dequantised weights take PyTorch's place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..genai.names import genai_name, linear_nodes
from ..pytorch.oracle import merge_adapter, plain_name
from .figures import Figures
from .result import QUANTISED, Check, Status

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..adapters.adapter import Adapter
    from ..pytorch.base import BaseModel

__all__ = ["dequantise_reference", "exact_arithmetic"]

_STEPS = 1.01
"""A quantised weight is at most a step from its own value: half a step by rounding, a whole one at the range's end."""


_MERGED = 0.25
"""How far from its own size a merged adapter may be found in quantised weights, besides what rounding explains."""


def exact_arithmetic(graph: ir.Model) -> bool:
    """Makes quantised products compute in float32 instead of int8, in place; False where nothing is quantised.

    The shipped graph rounds activations to int8 too (accuracy_level 4), which would hide an error of the adapter.
    """
    import onnx_ir as ir

    nodes = [node for node in graph.graph if node.op_type == "MatMulNBits"]
    for node in nodes:
        node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 1)
    return bool(nodes)


def dequantise_reference(graph: ir.Model, base: BaseModel, adapter: Adapter, *, merged: bool) -> Check:
    """Gives the PyTorch model the graph's own dequantised weights, in place; the adapter's stay exact.

    So what the quantisation costs is no error, and an error of the adapter can't hide behind it. With `merged` the
    low-rank halves are in the graph's weights, so they are merged here first. Returns the check that the quantised
    weights are the model's own: each within a step, and the merged adapter in them at its full size.
    """
    import torch

    if merged:
        merge_adapter(base.model)
    weights = _Dequantised(graph)
    sums = _WeightSums()
    for name, module in base.model.named_modules():
        if not isinstance(module, torch.nn.Linear) or any(part in name for part in _NOT_BASE):
            continue
        path = plain_name(name).removesuffix(".base_layer").removesuffix(".token_adapter")
        if found := weights.of(path, module.out_features):
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


_NOT_BASE = (".original_module", ".lora_", ".trf_")


class _Dequantised:
    """The float32 weights (N,K) of a graph's MatMulNBits nodes, and their steps, by torch module."""

    def __init__(self, graph: ir.Model):
        self._nodes = {name: node for name, (node, _) in linear_nodes(graph.graph).items()}

    def of(self, path: str, rows: int | None) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """(weights, steps), both (N,K), of the module at `path` with N = `rows`; None where it isn't quantised.

        The builder stacks q, k and v into one, and cuts Phi-3's gate_up_proj in two.
        """
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
