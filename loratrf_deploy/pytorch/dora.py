"""DoRA beside its base: y = g⊙(W x + s·B A x) + b with g = m / ‖W + s·B A‖, a norm for each row (arXiv 2402.09353)."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from ..adapters.adapter import Adapter, LayerAdapter
from ..errors import UserError

__all__ = ["gains_kept", "with_gains"]


def with_gains(adapter: Adapter, model: torch.nn.Module) -> Adapter:
    """`adapter` with gain, offset and scaled B in place of its magnitudes, from the weights of its base `model`.

    gain = g, offset = (1 - g)⊙b where the layer has a bias, and B becomes g⊙s·B, so that y = gain⊙h + offset +
    (x Aᵀ)Bᵀ is DoRA's with h = W x + b. A bias that the adapter trains is b. `model` may be PEFT's own, unmerged. Norms
    in float64. Requires `check_fits` to have passed; raises UserError for rows of zeros, which have no direction.
    """
    layers = {
        path: layer if layer.magnitude is None else _with_gain(layer, model, adapter.biases.get(f"{path}.bias"))
        for path, layer in adapter.layers.items()
    }
    return dataclasses.replace(adapter, layers=layers)


def _with_gain(layer: LayerAdapter, model: torch.nn.Module, trained_bias: NDArray[Any] | None) -> LayerAdapter:
    assert layer.magnitude is not None
    assert layer.A is not None
    module: Any = model.get_submodule(layer.name)
    base_layer = getattr(module, "base_layer", module)
    norms = _norms(base_layer, layer.scaled_B().astype(np.float64) @ layer.A)
    if not norms.all():
        raise UserError(
            f"Layer {layer.name}: {int((norms == 0).sum())} of {len(norms)} rows of the base's weight and the adapter "
            "are zero together, and DoRA scales by their norm. Pass the base that it was trained on: --base-model PATH."
        )
    gain = layer.magnitude / norms
    bias = trained_bias
    if bias is None and base_layer.bias is not None:
        bias = base_layer.bias.detach().double().numpy()
    offset = None if bias is None else ((1 - gain) * bias).astype(np.float32)
    B = (gain[:, None] * layer.scaled_B()).astype(np.float32)
    return dataclasses.replace(layer, B=B, scale=1.0, magnitude=None, gain=gain.astype(np.float32), offset=offset)


def _norms(base_layer: Any, delta: NDArray[np.float64]) -> NDArray[np.float64]:
    weight = base_layer.weight.detach().double().numpy()
    return np.linalg.norm((weight.T if isinstance(base_layer, Conv1D) else weight) + delta, axis=1)


@contextlib.contextmanager
def gains_kept(model: torch.nn.Module) -> Iterator[None]:
    """Inside, base weights of PEFT's `model` may be replaced; its DoRA layers keep the gains that they had before.

    PEFT takes norms of the weights that it finds, and an export those of the weights that it was given.
    """
    modules: Iterator[Any] = model.modules()
    layers = [module for module in modules if len(getattr(module, "lora_magnitude_vector", ()))]
    before = [_peft_norms(layer) for layer in layers]
    yield
    for layer, norms in zip(layers, before, strict=True):
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data *= torch.from_numpy(_peft_norms(layer) / norms).to(magnitude.dtype)


def _peft_norms(layer: Any) -> NDArray[np.float64]:
    A, B = (half["default"].weight.detach().double().numpy() for half in (layer.lora_A, layer.lora_B))
    return _norms(layer.get_base_layer(), layer.scaling["default"] * B @ A)
