"""Turning the adapter's weights from constants of the graph into inputs, so that adapters swap."""

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
from ..formats.manifest import Swappable
from ..formats.swappable import LAYER_PARTS, Default, RuntimeWeight, layer_weights, neutral
from ..ops.dtypes import DType
from ..ops.schemas import DOMAIN, FUNCTIONS

if TYPE_CHECKING:
    from ..pytorch.base import BaseModel

__all__ = ["Noise", "Swap", "find_weights", "placeholders", "weights_to_inputs"]


class Swap:
    """A swappable export in the making: attach `placeholders`, trace, finish, `apply`. Requires `check_swappable`."""

    def __init__(self, adapter: Adapter, base: BaseModel, dtype: DType, default: Default):
        self.placeholders = placeholders(adapter)
        self._adapter, self._dtype, self._default, self._untrained = adapter, dtype, default, base.untrained
        self._parameters = base.parameters
        state = base.model.state_dict()
        saved = [f"{module}.{name}" for module, tensors in adapter.modules_to_save.items() for name in tensors]
        self._own = {name: state[name].float().numpy().copy() for name in saved}

    def apply(self, graph: ir.Graph) -> tuple[dict[str, NDArray[Any]], Swappable]:
        """Makes the adapter's weights in the finished `graph` inputs, with defaults unless an adapter is required.

        Returns the adapter's own values by graph input, and what the manifest says of the graph.
        """
        weights = find_weights(graph, self.placeholders, self._dtype, self._default, self._untrained)
        values = fit(self._adapter, weights, self._adapter.filter_input)
        shapes = {weight.name: weight.shape for weight in weights}
        if self._default == "required":
            weights_to_inputs(graph, shapes, values, default=False)
        else:
            weights_to_inputs(graph, shapes, _defaults(weights, values, self._own))
        file = f"{self._adapter.name}{SUFFIX}"
        return values, Swappable(self._default, tuple(weights), file=file, base_parameters=self._parameters)


class Noise:
    """Random weights of which no two are equal: exporters merge weights of equal values and fold what they see.

    Around 1, since an exporter may drop what adds 0 or multiplies by 1. Exact in float16, so that values compare.
    """

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def of(self, *shape: int) -> NDArray[np.float32]:
        """float32 values of `shape`."""
        return self._rng.integers(512, 1024, shape).astype(np.float32) / np.float32(512)

    def like(self, value: NDArray[Any] | None) -> Any:
        """Values of the shape of `value`, None for None."""
        return None if value is None else self.of(*value.shape)


def placeholders(adapter: Adapter) -> Adapter:
    """`adapter` with random numbers in place of its own: what a swappable graph is traced with.

    The B of a fresh adapter is all zero, and each weight must be told by its values afterwards.
    """
    noise = Noise()
    return dataclasses.replace(
        adapter,
        layers={
            name: dataclasses.replace(
                layer, **{part: noise.like(getattr(layer, part)) for part in LAYER_PARTS}, scale=1.0, gamma=1.0
            )
            for name, layer in adapter.layers.items()
        },
        modules_to_save={
            module: {name: noise.like(value) for name, value in tensors.items()}
            for module, tensors in adapter.modules_to_save.items()
        },
    )


def find_weights(
    graph: ir.Graph, traced: Adapter, dtype: DType, default: Default, untrained: Collection[str]
) -> list[RuntimeWeight]:
    """The run-time weights in a finished graph that was traced with `traced`: layers first, in the graph's order.

    A saved module's parameter is found by its name or, where the exporter transposed it for MatMul, by its values.
    `default` is the model's; where it is "base", a module with parameters in `untrained`, which the base model has no
    values of its own for, has the adapter's. Raises UserError where the exporter folded a parameter into something
    else.
    """
    weights = []
    for node in graph:
        module = node.metadata_props.get("module", "")
        if node.domain == DOMAIN and node.op_type in FUNCTIONS and module in traced.layers:
            layer = traced.layers[module]
            parts = [part for part in FUNCTIONS[node.op_type].inputs if part in LAYER_PARTS]
            parts += [part for part in ("gain", "offset") if getattr(layer, part) is not None]
            weights += layer_weights(layer, parts, dtype, default)
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
                    default="adapter" if default == "base" and not own else default,
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
            chosen[weight.name] = neutral(weight)
        elif weight.default == "base":
            value = own[f"{weight.module}.{weight.part}"].astype(chosen[weight.name].dtype)
            chosen[weight.name] = np.ascontiguousarray(value.T if weight.transposed else value)
    return chosen


def weights_to_inputs(
    graph: ir.Graph,
    shapes: Mapping[str, Sequence[int | str]],
    values: Mapping[str, NDArray[Any]],
    *,
    default: bool = True,
) -> None:
    """Makes the initializers named in `shapes` inputs of the graph, in place. Requires all there.

    1. Each becomes a graph input behind those that the graph has, in the order of `shapes`.
    2. Its shape is the one given: a text is a symbolic dimension, which takes any size at run time.
    3. It takes the type of the value given.
    4. With `default` it stays an initializer, with that value: what the input is when nobody feeds it.
    """
    for name, shape in shapes.items():
        value = graph.initializers[name]
        tensor = ir.tensor(values[name], name=name)
        value.const_value = tensor
        value.dtype = tensor.dtype
        value.shape = ir.Shape(list(shape))
        if not default:
            del graph.initializers[name]
            value.const_value = None
        graph.inputs.append(value)
