"""An adapter as values for a model that takes adapters at run time. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..adapters.fits import check_exportable
from ..errors import UserError, some
from ..ops.dtypes import NUMPY
from .swappable import RuntimeWeight, neutral
from .tasks import padded

__all__ = ["check_always_active", "check_swappable", "fit"]


def check_swappable(adapter: Adapter) -> None:
    """UserError where `adapter` has what can't be a run-time weight: biases, or no separable form at all."""
    check_exportable(adapter)
    problem = adapter.not_separable
    if adapter.biases:
        problem = f"it trains biases of the base model ({some(adapter.biases)})"
    elif biased := [name for name, layer in adapter.layers.items() if layer.lora_bias is not None]:
        problem = f"it has lora_bias ({some(biased)})"
    elif odd := [
        f"{module}.{name}"
        for module, tensors in adapter.modules_to_save.items()
        for name, value in tensors.items()
        if value.dtype.kind != "f"
    ]:
        problem = f"it saves weights that are not floats ({some(odd)})"
    if problem:
        raise UserError(
            f"The adapter {adapter.path} can't be swapped at run time: {problem}. Export it as a model of its own: "
            "--adapter, without --swappable and --onto."
        )


def check_always_active(adapter: Adapter) -> None:
    """UserError for an aLoRA, where nothing can switch an adapter on within a prompt."""
    if adapter.invocation_tokens is not None:
        raise UserError(
            f"The adapter {adapter.path} is active only after its invocation tokens (alora_invocation_tokens). Only a "
            "causal language model whose adapters swap can do that: export it with --swappable base."
        )


def fit(
    adapter: Adapter, weights: Sequence[RuntimeWeight], filter_input: str, task: str | None = None
) -> dict[str, NDArray[Any]]:
    """Graph input -> value for every one of `weights`, from `adapter`: alpha/R in B, gamma in D, any rank.

    Layers and halves that the adapter lacks get explicit zeros (gains ones), so the result is complete; so do heads
    of another `task` than the adapter's, in a model of several, for which its modules have the graph's names
    (`tasks.in_graph`). Of a DoRA, what `with_gains` made. Raises UserError naming what doesn't fit: layers, filters or
    saved modules that the graph lacks, other sizes, more labels, another filter_input, saved modules that the adapter
    doesn't bring.
    """
    check_swappable(adapter)
    problems = _misfits(adapter, weights, filter_input, task)
    values: dict[str, NDArray[Any]] = {}
    for weight in weights if not problems else ():
        value = _value(adapter, weight, task)
        with np.errstate(over="ignore"):
            values[weight.name] = np.ascontiguousarray(value, dtype=NUMPY[weight.dtype])
        if not np.isfinite(values[weight.name]).all():
            problems.append(f"{weight.name} exceeds {weight.dtype}, which the model computes in")
    if problems:
        raise UserError(
            f"The adapter {adapter.path} doesn't fit this model: {some(problems, '; ')}. Expected an adapter of the "
            "same base model on layers that the model was exported with. Export a model from this adapter, or from one "
            "that covers the layers of all your adapters."
        )
    return values


def _is_anothers(weight: RuntimeWeight, task: str | None) -> bool:
    return weight.task is not None and weight.task != task


def _value(adapter: Adapter, weight: RuntimeWeight, task: str | None) -> NDArray[Any]:
    if not weight.in_layer:
        if _is_anothers(weight, task):
            return np.zeros([int(dim) for dim in weight.shape], NUMPY[weight.dtype])
        saved = adapter.modules_to_save[weight.module][weight.part]
        if weight.labels:
            return padded(saved, int(weight.shape[0]), NUMPY[weight.dtype])
        return saved.T if weight.transposed else saved
    layer = adapter.layers.get(weight.module)
    value = getattr(layer, weight.part, None)
    if layer is None or value is None:
        return neutral(weight)
    return {"B": layer.scaled_B, "D": layer.scaled_D}.get(weight.part, lambda: value)()


def _misfits(adapter: Adapter, weights: Sequence[RuntimeWeight], filter_input: str, task: str | None) -> list[str]:
    problems = []
    known: dict[str, dict[str, RuntimeWeight]] = {}
    for weight in weights:
        known.setdefault(weight.module, {})[weight.part] = weight
    for name, layer in adapter.layers.items():
        graph = known.get(name, {})
        assert layer.magnitude is None  # a gain comes of it and of the base
        for half, part, size in (
            ("low-rank half", "A", layer.in_features),
            ("filter", "tau", layer.out_features),
            ("DoRA gain", "gain", layer.out_features),
        ):
            if getattr(layer, part) is None:
                continue
            if part not in graph and part == "A" and layer.B is not None and not layer.B.any():
                continue  # never trained, as where the base model's forward passes over the layer (WavLM's q_proj)
            if part not in graph:
                problems.append(f"the model takes no {half} at {name}")
            elif graph[part].in_table != layer.embedding:
                kinds = ("a linear layer", "an embedding table")
                problems.append(
                    f"{name} is {kinds[graph[part].in_table]} in the model, {kinds[layer.embedding]} in the adapter"
                )
            elif graph[part].shape[-1] != size or graph[part].module != name:
                problems.append(f"{name} has {graph[part].shape[-1]} features in the model, {size} in the adapter")
        if "B" in graph and layer.A is not None and graph["B"].shape[0] != layer.out_features:
            problems.append(f"{name} gives {graph['B'].shape[0]} features in the model, {layer.out_features} in the "
                            "adapter")  # fmt: skip
    if adapter.filter_input != filter_input and any(
        layer.A is not None and layer.tau is not None for layer in adapter.layers.values()
    ):
        problems.append(f'its filters read filter_input "{adapter.filter_input}", the model\'s "{filter_input}"')
    for module, tensors in adapter.modules_to_save.items():
        for name in tensors:
            if known.get(module, {}).get(name) is None:
                problems.append(f"the model takes no {module}.{name}")
    for weight in weights:
        if weight.in_layer or _is_anothers(weight, task):
            continue
        value = adapter.modules_to_save.get(weight.module, {}).get(weight.part)
        wanted = weight.shape[::-1] if weight.transposed else weight.shape
        if value is None:
            problems.append(f"the model takes {weight.module}.{weight.part} from its adapter, which brings none")
        elif weight.labels and value.shape[1:] == wanted[1:]:
            if len(value) > int(wanted[0]):
                problems.append(f"it has {len(value)} labels ({weight.module}.{weight.part}), the model has room for "
                                f"{wanted[0]}")  # fmt: skip
        elif value.shape != wanted:
            problems.append(f"{weight.module}.{weight.part} is {wanted} in the model, {value.shape} in the adapter")
    return problems
