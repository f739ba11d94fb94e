"""Attaching an adapter to a torch model for export: folded into the weights, or as nodes of the loratrf operators."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter, LayerAdapter
from ..formats.manifest import LayerRow
from ..formats.swappable import LAYER_PARTS, TABLE_PARTS
from ..ops.schemas import ADAPTER_IDS, DOMAIN, FUNCTIONS, IDS, VERSION

__all__ = ["AdaptedLinear", "attach", "fold", "layer_rows", "op_of", "wrap"]

_PARAMETER_OF_INPUT = {**LAYER_PARTS, "W": "slots.weight", "b": "slots.bias"}


class AdaptedLinear(nn.Module):
    """y = OP(base_layer(x), [x,] weights): a frozen linear layer followed by one loratrf operator in the ONNX graph.

    Or an embedding table, whose x are ids; what it multiplies its rows by (BART, Gemma) comes after the operator.
    `weights` are the operator's, by input, and "gain" and "offset" where h becomes gain⊙h + offset before it. B carries
    alpha/R and D carries gamma already. Parameters are named as in adapter files, so that initializers are too. A
    grouped operator's adapter_ids are left out: they are an input of the graph, which the grouped export adds. Where
    `rows` are set, x (1,P,K) is what as many rows share, and y each one's own (`positions`). Only for tracing: run
    eagerly it returns unspecified values.
    """

    rows: int | torch.SymInt | None = None

    def __init__(self, base_layer: nn.Module, op: str, weights: dict[str, torch.Tensor], attributes: Mapping[str, str]):
        super().__init__()
        self.base_layer = base_layer
        self.op, self.attributes = op, attributes
        self.scale: float | None = None
        if self.embeds and (scale := getattr(base_layer, "embed_scale", None)) is not None:
            self.scale = float(scale)
            base_layer.embed_scale = scale / scale
        for name, value in weights.items():
            holder, _, parameter = self._stored_as(name).rpartition(".")
            if holder and holder not in self._modules:
                self.add_module(holder, nn.Module())
            owner = self.get_submodule(holder)
            owner.register_parameter(parameter, nn.Parameter(value, requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.base_layer(x)
        if "lora_gain" in self._parameters:
            hidden = hidden * self.get_parameter("lora_gain")
        if "lora_offset" in self._parameters:
            hidden = hidden + self.get_parameter("lora_offset")
        if self.rows is not None:
            x, hidden = (value.expand(self.rows, -1, -1) for value in (x, hidden))
        inputs = [self._input(name, hidden, x) for name in FUNCTIONS[self.op].inputs if name != ADAPTER_IDS]
        output = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.op}",
            inputs,
            attrs={**self.attributes},
            dtype=hidden.dtype,
            shape=hidden.shape,
            version=VERSION,
        )
        return output if self.scale is None else output * self.scale

    @property
    def embeds(self) -> bool:
        """Whether the frozen layer is an embedding table."""
        return IDS in FUNCTIONS[self.op].inputs

    @property
    def weight(self) -> Any:
        """The frozen layer's, as PEFT's layers give it: WavLM's attention reads it, and never calls the layer."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    def _input(self, name: str, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if name in ("base", "z"):
            return hidden
        if name in ("x", IDS):
            return x
        return self.get_parameter(self._stored_as(name))

    def _stored_as(self, name: str) -> str:
        return (TABLE_PARTS if self.embeds else _PARAMETER_OF_INPUT)[name]


def attach(model: nn.Module, adapter: Adapter, *, merge: bool, dtype: torch.dtype) -> list[LayerRow]:
    """Puts `adapter` into `model` in place and turns it to `dtype`; returns what became of each layer, in order.

    What `fold` leaves over becomes AdaptedLinear modules. Requires `check_fits` to have passed.
    """
    rest = fold(model, adapter, merge=merge)
    for path, weights in rest.items():
        op = op_of(weights, embedding=adapter.layers[path].embedding)
        attributes = {"filter_input": adapter.filter_input} if FUNCTIONS[op].attributes else {}
        parameters = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
        wrap(model, path, op, parameters, attributes)
    model.to(dtype)
    return layer_rows(adapter, rest)


def wrap(
    model: nn.Module, path: str, op: str, weights: dict[str, torch.Tensor], attributes: Mapping[str, str] | None = None
) -> None:
    """Puts an AdaptedLinear around the linear layer or embedding table at `path` of `model`, in place."""
    parent, _, child = path.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, child, AdaptedLinear(owner.get_submodule(child), op, weights, attributes or {}))


def fold(model: nn.Module, adapter: Adapter, *, merge: bool) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Puts into the weights of `model` what belongs there; returns what stays beside them: path -> operator weights.

    Saved modules, trained biases and the low-rank halves' biases always go in. With `merge` W' = W + (alpha/R)·BA too,
    in float32, of a DoRA gain⊙W in the place of W. A filter never folds, since it depends on the token: such a layer
    keeps tau, C and D, and A and B as well where the filter reads the unadapted output (filter_input "base"). Requires
    `check_fits` to have passed.
    """
    for path, tensors in adapter.modules_to_save.items():
        for name, value in tensors.items():
            _set_parameter(model, f"{path}.{name}", value)
    for name, value in adapter.biases.items():
        _set_parameter(model, name, value)
    rest = {}
    for path, layer in adapter.layers.items():
        base_layer = model.get_submodule(path)
        if layer.lora_bias is not None:
            _add_bias(base_layer, layer.lora_bias * layer.scale)
        folds = merge and layer.A is not None and (layer.tau is None or adapter.filter_input == "adapted")
        if folds:
            _fold(base_layer, layer)
        if weights := _weights(layer, keep_low_rank=not folds):
            rest[path] = weights
    return rest


def op_of(weights: Mapping[str, Any], *, embedding: bool = False) -> str:
    """The operator that takes these weights: LowRank for A and B, TaskFilter for tau, C and D, LoraTrf for all.

    GroupedLoraTrf for all of them with slots, (S, ...). Those of an `embedding` table have operators of their own.
    """
    if embedding:
        return "GroupedLowRankEmbedding" if weights["A"].ndim == 3 else "LowRankEmbedding"
    if "tau" in weights and weights["tau"].ndim == 2:
        return "GroupedLoraTrf"
    return {(True, False): "LowRank", (False, True): "TaskFilter", (True, True): "LoraTrf"}[
        ("A" in weights, "tau" in weights)
    ]


def layer_rows(adapter: Adapter, rest: Mapping[str, Mapping[str, Any]]) -> list[LayerRow]:
    """The manifest's row of each adapted layer; `rest` is what `fold` returned."""
    return [
        LayerRow(
            path,
            op_of(rest[path], embedding=layer.embedding) if path in rest else "merged",
            layer.rank,
            layer.filter_rank,
            layer.in_features,
            layer.out_features,
        )
        for path, layer in adapter.layers.items()
    ]


def _weights(layer: LayerAdapter, *, keep_low_rank: bool) -> dict[str, NDArray[np.float32]]:
    weights: dict[str, NDArray[np.float32]] = {}
    if keep_low_rank and layer.A is not None:
        weights |= {"A": layer.A, "B": layer.scaled_B()}
        weights |= {part: value for part in ("gain", "offset") if (value := getattr(layer, part)) is not None}
    if layer.tau is not None:
        assert layer.C is not None  # read_adapter takes whole filters only
        weights |= {"tau": layer.tau, "C": layer.C, "D": layer.scaled_D()}
    return weights


def _fold(base_layer: nn.Module, layer: LayerAdapter) -> None:
    assert layer.A is not None
    delta = torch.from_numpy(layer.scaled_B() @ layer.A)
    weight = base_layer.weight
    assert isinstance(weight, nn.Parameter)
    if isinstance(base_layer, Conv1D | nn.Embedding):  # GPT-2 keeps its weights transposed, (K,N); so does a table
        delta = delta.T
    frozen = weight.detach().float()
    if layer.gain is not None:
        gain = torch.from_numpy(layer.gain)
        frozen = frozen * (gain if isinstance(base_layer, Conv1D) else gain[:, None])
    base_layer.weight = nn.Parameter(frozen + delta, requires_grad=False)
    bias = getattr(base_layer, "bias", None)
    if isinstance(bias, nn.Parameter):  # one dtype for the layer until `attach` rounds the whole model
        base_layer.bias = nn.Parameter(bias.detach().float(), requires_grad=False)


def _add_bias(base_layer: nn.Module, value: NDArray[np.float32]) -> None:
    bias = torch.from_numpy(np.asarray(value, dtype=np.float32))
    if isinstance(base_layer.bias, nn.Parameter):
        bias = base_layer.bias.detach().float() + bias
    base_layer.bias = nn.Parameter(bias, requires_grad=False)


def _set_parameter(model: nn.Module, name: str, value: NDArray[Any]) -> None:
    """Replaces a parameter rather than writing into it: a tied one must not change its twin."""
    parent, _, child = name.rpartition(".")
    module = model.get_submodule(parent)
    tensor = torch.from_numpy(np.asarray(value).copy())
    if child in module._buffers:
        module._buffers[child] = tensor
    else:
        setattr(module, child, nn.Parameter(tensor, requires_grad=False))
