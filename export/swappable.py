"""Turning the adapter's weights from constants of the graph into inputs that keep a default, so that adapters swap."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..errors import UserError
from ..formats.adapter_file import SUFFIX
from ..formats.fit import fit
from ..formats.swappable import LAYER_PARTS, RuntimeWeight, layer_weights, zeros
from ..ops.schemas import DOMAIN, OPS

if TYPE_CHECKING:
    from ..pytorch.base import BaseModel

__all__ = ["Swap", "find_weights", "placeholders", "weights_to_inputs"]


class Swap:
    """A swappable export in the making: attach `placeholders`, trace, finish, `apply`; then `values` and `facts` hold.

    `values` are `adapter`'s by graph input, `facts` what the manifest says of the graph. `default` is "base" or
    "adapter". Requires `check_swappable`.
    """

    def __init__(self, adapter: Adapter, base: BaseModel, dtype: str, default: str):
        self.placeholders = placeholders(adapter)
        self.values: dict[str, NDArray[Any]] = {}
        self.facts: dict[str, Any] = {}
        self._adapter, self._dtype, self._default, self._untrained = adapter, dtype, default, base.untrained
        state = base.model.state_dict()
        saved = [f"{module}.{name}" for module, tensors in adapter.modules_to_save.items() for name in tensors]
        self._own = {name: state[name].float().numpy().copy() for name in saved}

    def apply(self, graph: ir.Graph) -> None:
        """Makes the adapter's weights in the finished `graph` inputs with defaults."""
        weights = find_weights(graph, self.placeholders, self._dtype, self._default, self._untrained)
        self.values = fit(self._adapter, weights, self._adapter.filter_input)
        weights_to_inputs(
            graph, {weight.name: weight.shape for weight in weights}, _defaults(weights, self.values, self._own)
        )
        self.facts = {
            "default": self._default,
            "file": f"{self._adapter.path.resolve().name}{SUFFIX}",
            "weights": [weight.to_dict() for weight in weights],
        }


def placeholders(adapter: Adapter) -> Adapter:
    """`adapter` with random numbers in place of its own: what a swappable graph is traced with.

    Exporters merge weights of equal values (the B of a fresh adapter: all zero) and fold what they see. No two weights
    are equal here, and each can be told by its values afterwards.
    """
    rng = np.random.default_rng(0)

    def noise(value: NDArray[Any] | None) -> Any:
        # Around 1: an exporter may drop what adds 0 or multiplies by 1. Exact in float16, so that values compare.
        return None if value is None else rng.integers(512, 1024, value.shape).astype(np.float32) / 512

    return dataclasses.replace(
        adapter,
        layers={
            name: dataclasses.replace(
                layer, **{part: noise(getattr(layer, part)) for part in LAYER_PARTS}, scale=1.0, gamma=1.0
            )
            for name, layer in adapter.layers.items()
        },
        modules_to_save={
            module: {name: noise(value) for name, value in tensors.items()}
            for module, tensors in adapter.modules_to_save.items()
        },
    )


def find_weights(
    graph: ir.Graph, traced: Adapter, dtype: str, default: str, untrained: Collection[str]
) -> list[RuntimeWeight]:
    """The run-time weights in a finished graph that was traced with `traced`: layers first, in the graph's order.

    A saved module's parameter is found by its name or, where the exporter transposed it for MatMul, by its values.
    `default` is "base" or "adapter"; a module with parameters in `untrained`, which the base model has no values of its
    own for, has the adapter's either way. Raises UserError where the exporter folded a parameter into something else.
    """
    weights = []
    for node in graph:
        module = node.metadata_props.get("module", "")
        if node.domain == DOMAIN and node.op_type in OPS and module in traced.layers:
            parts = [part for part in OPS[node.op_type].inputs if part in LAYER_PARTS]
            weights += layer_weights(traced.layers[module], parts, dtype, default)
    weights = list({weight.name: weight for weight in weights}.values())  # a shared layer is called more than once
    for module, tensors in traced.modules_to_save.items():
        own = not any(f"{module}.{part}" in untrained for part in tensors)
        for part, value in tensors.items():
            name, transposed = _find(graph, f"{module}.{part}", value)
            weights.append(
                RuntimeWeight(
                    name=name,
                    module=module,
                    part=part,
                    shape=value.shape[::-1] if transposed else value.shape,
                    dtype=dtype,
                    transposed=transposed,
                    default=default if own else "adapter",
                )
            )
    return weights


def _find(graph: ir.Graph, name: str, value: NDArray[Any]) -> tuple[str, bool]:
    named = graph.initializers.get(name)
    if named is not None and _holds(named, value):
        return name, False
    for key, initializer in graph.initializers.items():
        if _holds(initializer, value.T) and value.ndim == 2:
            return key, True
        if _holds(initializer, value):
            return key, False
    raise UserError(
        f"{name} can't be given at run time: the exporter folded it into another weight. Export this adapter without "
        "--swappable."
    )


def _holds(initializer: ir.Value, value: NDArray[Any]) -> bool:
    tensor = initializer.const_value
    return tensor is not None and tuple(tensor.shape) == value.shape and np.array_equal(tensor.numpy(), value)


def _defaults(
    weights: Sequence[RuntimeWeight], values: Mapping[str, NDArray[Any]], own: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Graph input -> the value that it has when no adapter is given, by each weight's `default`.

    "adapter": that of `values`, which `fit` gave. "base": zeros in a layer, so that the output is the base's; the base
    model's own value in a saved module, from `own` (parameter -> value).
    """
    chosen = dict(values)
    for weight in weights:
        if weight.default == "base" and weight.in_layer:
            chosen[weight.name] = zeros(weight)
        elif weight.default == "base":
            value = own[f"{weight.module}.{weight.part}"].astype(chosen[weight.name].dtype)
            chosen[weight.name] = np.ascontiguousarray(value.T if weight.transposed else value)
    return chosen


def weights_to_inputs(
    graph: ir.Graph, shapes: Mapping[str, Sequence[int | str]], values: Mapping[str, NDArray[Any]]
) -> None:
    """Makes the initializers named in `shapes` inputs of the graph, in place, each with a default. Requires all there.

    1. Each becomes a graph input behind those that the graph has, in the order of `shapes`.
    2. Its shape is the one given: a text is a symbolic dimension, which takes any size at run time.
    3. It stays an initializer, with the value given, whose type it takes: what the input is when nobody feeds it.
    """
    for name, shape in shapes.items():
        value = graph.initializers[name]
        tensor = ir.tensor(values[name], name=name)
        value.const_value = tensor
        value.dtype = tensor.dtype
        value.shape = ir.Shape(list(shape))
        graph.inputs.append(value)
