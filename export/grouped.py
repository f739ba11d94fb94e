"""One model for many adapters: every batch row names its own, in the graph input adapter_ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..adapters.adapter import Adapter, LayerAdapter, check_fits, read_adapter
from ..errors import UserError, some
from ..formats.adapter_file import SUFFIX, adapter_facts, file_facts, write_adapter_file
from ..formats.fit import check_swappable, fit
from ..formats.swappable import LAYER_PARTS, RuntimeWeight, layer_weights
from ..ops.schemas import ADAPTER_IDS, DOMAIN, MAX_RANK
from ..parity.grouped import check_grouped_parity
from ..pytorch.base import GENERATION, load_base
from ..runtime.slots import Slots
from .files import check_writable
from .proven import (
    Clock,
    ExportResult,
    check_opset,
    collector_off,
    common_facts,
    traced_inputs,
    write_companions,
    write_proven,
)

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from ..parity.single import ParityReport
    from ..pytorch.base import BaseModel

__all__ = ["export_grouped"]

_DTYPES = ("float32", "float16")


def export_grouped(
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    base_model: str | Path | None = None,
    dtype: str = "float32",
    opset: int | None = None,
    check: bool = True,
    step: Callable[[str], None] = lambda text: None,
) -> ExportResult:
    """Writes one model that holds all `adapters` (name -> folder), in slots in their order; rows choose by adapter_ids.

    adapter_ids (batch) int64 is an input of the graph: a row's slot, or -1 for the base model alone. Layers are the
    union of the adapters', ranks the highest; classification heads are kept per adapter. Every weight is a graph input
    whose default is the adapters' own, (S, ...) with symbolic S and ranks, so that slots can be refilled without a new
    session. Files, options and exceptions are those of `export_adapter`; UserError too where the adapters don't share
    base, task or filter_input, or hold what can't differ per row.
    """
    out = Path(out)
    if dtype not in _DTYPES:
        raise UserError(f"--dtype is {dtype!r}, expected for several adapters: {' or '.join(_DTYPES)}.")
    check_writable(out)
    for name in adapters:
        if not re.fullmatch(r"(?!\.)[\w .+-]{1,60}", name):
            raise UserError(
                f"--adapters has the name {name[:80]!r}, which is to be a file's too (NAME{SUFFIX}): expected up to 60 "
                "letters, digits, spaces and . _ + -, not beginning with a dot."
            )
    loaded = {name: read_adapter(path) for name, path in adapters.items()}
    _check_together(loaded, base_model)
    opset = check_opset(opset)

    def write(model: Path, clock: Clock) -> dict[str, Any]:
        return _write_model(loaded, base_model, model, dtype, opset, clock)

    def prove(model: Path, _: dict[str, Any]) -> ParityReport:
        return check_grouped_parity(model, {name: adapter.path for name, adapter in loaded.items()}, base_model)

    return write_proven(out, write, prove if check else None, step)


def _check_together(adapters: Mapping[str, Adapter], base_model: str | Path | None) -> None:
    """UserError naming the adapters that can't be in one model, as far as their files alone tell."""
    if not adapters:
        raise UserError("--adapters names no adapter, expected at least one: --adapters NAME=PATH ...")
    first_name, first = next(iter(adapters.items()))
    for name, adapter in adapters.items():
        check_swappable(adapter)
        if high := [path for path, layer in adapter.layers.items() if max(layer.rank, layer.filter_rank) > MAX_RANK]:
            raise UserError(
                f"The adapter {adapter.path} has ranks over {MAX_RANK} at {some(high)}, more than the "
                "operators take. Leave it out and export it merged: --adapter PATH --mode merged."
            )
        if adapter.task_type != first.task_type:
            raise UserError(
                f"The adapters {first_name} and {name} were trained for different tasks ({first.task_type} and "
                f"{adapter.task_type}): one model has one task. Export them apart."
            )
        if base_model is None and adapter.base_model != first.base_model:
            raise UserError(
                f"The adapters {first_name} and {name} name different base models ({first.base_model} and "
                f"{adapter.base_model}). If these are the same model, pass it: --base-model PATH. Otherwise export "
                "them apart."
            )


def _write_model(
    adapters: Mapping[str, Adapter], base_model: str | Path | None, out: Path, dtype: str, opset: int, clock: Clock
) -> dict[str, Any]:
    clock("importing torch and transformers")
    import onnx_ir as ir
    import torch

    from .graph import finish, trace
    from .swappable import weights_to_inputs

    clock("loading the base model")
    base = load_base(next(iter(adapters.values())), base_model)
    if base.task == GENERATION:
        raise UserError(
            "Several adapters in one model (--adapters) isn't for causal language models: ONNX Runtime GenAI feeds the "
            "graph and knows no adapter ids. Export each by itself: --adapter PATH."
        )
    shapes = {key: tuple(value.shape) for key, value in base.model.state_dict().items()}
    for adapter in adapters.values():
        check_fits(adapter, shapes)
    clock("adapting")
    filter_input = _filter_input(adapters.values())
    layers = _union(adapters.values(), shapes)
    weights = [weight for layer in layers.values() for weight in layer_weights(layer, LAYER_PARTS, dtype, "adapter")]
    weights += _head_weights(adapters, base, dtype)
    slots = Slots(weights, len(adapters))
    values = [fit(adapter, weights, filter_input) for adapter in adapters.values()]
    for slot, own in enumerate(values):
        slots.put(slot, own)
    _attach(base, layers, weights, filter_input)
    base.model.to(getattr(torch, dtype))
    inputs = traced_inputs(base, dtype)
    clock("tracing")
    with collector_off():
        program = trace(base.model, inputs, opset)
        _add_adapter_ids(program.graph)
        finish(program, opset)
    _check_batch_rows(program.graph)
    weights_to_inputs(program.graph, {weight.name: ("slots", *weight.shape) for weight in weights}, slots.values)
    clock("writing")
    ir.save(program, out, external_data=f"{out.name}.data")
    write_companions(base, next(iter(adapters.values())), out.parent)
    manifest = common_facts(base, out, "grouped", dtype, opset)
    manifest["adapter"] = {"filter_input": filter_input, "parameters": sum(map(_parameters, adapters.values()))}
    manifest["layers"] = [_row(layer, slots) for layer in layers.values()]
    manifest["swappable"] = {
        "default": "adapter",
        "slots": {name: slot for slot, name in enumerate(adapters)},
        "adapters": {name: adapter_facts(adapter) for name, adapter in adapters.items()},
        "weights": [weight.to_dict() for weight in weights],
    }
    for (name, adapter), own in zip(adapters.items(), values, strict=True):
        write_adapter_file(out.with_name(f"{name}{SUFFIX}"), own, file_facts(adapter, manifest))
    return manifest


def _filter_input(adapters: Iterable[Adapter]) -> str:
    """That of the first adapter for which it makes a difference; `fit` holds the others to it."""
    for adapter in adapters:
        if any(layer.A is not None and layer.tau is not None for layer in adapter.layers.values()):
            return adapter.filter_input
    return "adapted"


def _union(adapters: Iterable[Adapter], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LayerAdapter]:
    """Every layer that an adapter has, with both halves at rank 1, in random numbers of which no two are equal.

    Exporters merge weights of equal values and fold what they see; the weights proper come after the trace.
    """
    rng = np.random.default_rng(0)
    layers = {}
    for path in sorted({path for adapter in adapters for path in adapter.layers}):
        outs, ins = shapes[f"{path}.weight"]
        sizes = {"A": (1, ins), "B": (outs, 1), "tau": (outs,), "C": (1, outs), "D": (outs, 1)}
        parts: dict[str, Any] = {part: rng.random(size, np.float32) for part, size in sizes.items()}
        layers[path] = LayerAdapter(path, **parts, lora_bias=None, scale=1.0, gamma=1.0)
    return layers


def _head_weights(adapters: Mapping[str, Adapter], base: BaseModel, dtype: str) -> list[RuntimeWeight]:
    """One weight per parameter of the modules that adapters save whole: linear layers with a bias, and nothing else."""
    from torch import nn

    weights: dict[str, RuntimeWeight] = {}
    for name, adapter in adapters.items():
        for path, tensors in adapter.modules_to_save.items():
            for parameter in tensors:
                linear, _, kind = f"{path}.{parameter}".rpartition(".")
                module = base.model.get_submodule(linear)
                if not isinstance(module, nn.Linear) or module.bias is None:
                    raise UserError(
                        f"The adapter {name} saves {linear}, a {type(module).__name__}: in one model for many adapters "
                        "only linear layers with a bias can be saved per adapter. Export it on its own."
                    )
                shape = tuple(module.get_parameter(kind).shape)
                weights[f"{linear}.{kind}"] = RuntimeWeight(
                    f"{linear}.slots.{kind}", path, parameter, shape, dtype, default="adapter"
                )
    return list(weights.values())


def _attach(
    base: BaseModel, layers: Mapping[str, LayerAdapter], weights: Iterable[RuntimeWeight], filter_input: str
) -> None:
    """Puts one slot of placeholders into the base model: GroupedLoraTrf on `layers`, GroupedLinear on saved heads."""
    import torch

    from .adapted import AdaptedLinear

    def wrap(path: str, op: str, values: dict[str, torch.Tensor], attributes: dict[str, str]) -> None:
        parent, _, child = path.rpartition(".")
        owner = base.model.get_submodule(parent)
        setattr(owner, child, AdaptedLinear(owner.get_submodule(child), op, values, attributes))

    for path, layer in layers.items():
        values = {part: torch.from_numpy(getattr(layer, part))[None] for part in LAYER_PARTS}
        wrap(path, "GroupedLoraTrf", values, {"filter_input": filter_input})
    generator = torch.Generator().manual_seed(0)
    heads = {weight.name.rpartition(".slots.")[0]: None for weight in weights if not weight.in_layer}
    for path in heads:
        linear = base.model.get_submodule(path)
        for kind, parameter in linear.named_parameters():
            if f"{path}.{kind}" in base.untrained:  # what row -1 gives must not be by chance
                parameter.data.zero_()
        noise = [torch.rand(1, *parameter.shape, generator=generator) for parameter in (linear.weight, linear.bias)]
        wrap(path, "GroupedLinear", dict(zip("Wb", noise, strict=True)), {})


def _add_adapter_ids(graph: ir.Graph) -> None:
    """The graph input adapter_ids (batch) int64, the last input of every grouped node."""
    import onnx_ir as ir

    ids = ir.Value(name=ADAPTER_IDS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"]))
    graph.inputs.append(ids)
    for node in _grouped_nodes(graph):
        node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(len(node.inputs) - 1, ids)


def _check_batch_rows(graph: ir.Graph) -> None:
    """UserError where an adapted layer sees anything but the batch's rows: there, rows have no adapter of their own."""
    wrong = [
        node.metadata_props.get("module", "")
        for node in _grouped_nodes(graph)
        if (shape := node.outputs[0].shape) is None or str(shape[0]) != "batch"
    ]
    if wrong:
        raise UserError(
            f"{some(dict.fromkeys(wrong))} also runs on what is no row of the batch, such as relative positions that "
            "all rows share. There, rows can't have adapters of their own: export the adapters apart, or train them on "
            "other layers."
        )


def _grouped_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph.all_nodes() if node.domain == DOMAIN]


def _parameters(adapter: Adapter) -> int:
    return sum(layer.parameters for layer in adapter.layers.values())


def _row(layer: LayerAdapter, slots: Slots) -> dict[str, Any]:
    rank, filter_rank = (slots.values[f"{layer.name}.{LAYER_PARTS[part]}"].shape[1] for part in "AC")
    return {
        "module": layer.name,
        "op": "GroupedLoraTrf",
        "rank": rank,
        "filter_rank": filter_rank,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
    }
