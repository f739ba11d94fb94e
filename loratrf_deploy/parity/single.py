"""Does an exported model compute what PyTorch computed? The measurement; `report` shows it, `parity_cli` runs it.

The oracle is PEFT's own model in float32. ONNX Runtime runs the export with the custom-op library and without it, and a
third comparison switches the adapter off in PyTorch: an export that equals the bare base has lost its adapter.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..adapters.adapter import read_adapter
from ..errors import UserError, some
from ..formats.fit import fit
from ..formats.swappable import read_swappable
from ..ops.schemas import DOMAIN, OPS
from ..pytorch.base import Outputs
from ..pytorch.oracle import load_reference, run_torch
from ..runtime.session import PROVIDERS, check_providers
from .checks import TOLERANCES, effect_checks, parity_checks, worst_batch
from .greedy import check_greedy, is_generating
from .inputs import complete, default_inputs, padding_mask, read_inputs
from .layers import compare_layers
from .onnx_runs import NotComparable, is_cache, load_graph, model_dtype, run_batches
from .quantised import dequantise_reference, exact_arithmetic
from .result import NO_ADAPTER, VARIANTS, Check, LayerError, ParityReport

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..adapters.adapter import Adapter
    from ..pytorch.base import BaseModel

__all__ = ["VARIANTS", "Check", "LayerError", "ParityReport", "check_parity", "versions"]

GENERATION_TOLERANCE = 1e-4
"""Of float32 causal language models: rounding adds up over many more layers than an encoder has."""


def check_parity(
    model: str | Path,
    adapter: str | Path,
    base_model: str | Path | None = None,
    inputs: Sequence[Mapping[str, NDArray[Any]]] | Path | None = None,
    *,
    tolerance: float | None = None,
    reference: BaseModel | None = None,
    device: str = "cpu",
    step: Callable[[str], None] = lambda text: None,
) -> ParityReport:
    """max|onnx - torch| / max|torch| <= tolerance for every output, with and without the library; and onnx ≠ base.

    `inputs`: batches by input name, ids (batch, sequence) integers or pixels (batch, channels, H, W); or a JSON-lines
    file of texts or arrays; None makes random ones of several sizes, padding included. `tolerance` None takes the one
    of the model's dtype. `reference` is what `load_reference` gives, where the caller has it already; None loads one
    whose weights are rounded to the model's dtype and whose arithmetic is float32. Both maxima are over all batches;
    where an output has a row per token, padded tokens are left out (nothing reads them, and attention libraries differ
    on them), but must be finite. A swappable model is given the adapter's weights as --onto converts them, and is also
    run without. `device` "cuda" runs ONNX Runtime on the GPU; PyTorch stays on the CPU. Raises UserError where model,
    adapter, base or inputs are at fault; a model that doesn't compute the same is a report.
    """
    begin = time.perf_counter()
    model = Path(model)
    check_providers([PROVIDERS[device]])
    step("reading the model")
    graph = load_graph(model)
    dtype = model_dtype(graph)
    generates = is_generating(model)
    if tolerance is None:
        tolerance = GENERATION_TOLERANCE if generates and dtype == "float32" else TOLERANCES.get(dtype, 1e-5)
    read = read_adapter(adapter)
    step("loading PyTorch's model")
    folded = _folded(read, graph)
    base = reference or load_reference(read, base_model, dtype=dtype, merge=bool(folded))
    quantised = exact_arithmetic(graph)
    weight_checks = []
    if quantised:
        step("dequantising")
        merged = bool(folded or read.not_separable)
        weight_checks = [dequantise_reference(graph, base, read, merged=merged)]
    names = [
        name
        for value in graph.graph.inputs
        if (name := value.name or "") not in graph.graph.initializers and not is_cache(name)
    ]
    swappable = read_swappable(model) if any(v.name in graph.graph.initializers for v in graph.graph.inputs) else None
    if swappable and swappable.slots:
        raise UserError(
            f"{model} holds several adapters ({some(swappable.slots)}). Compare them all: loratrf-parity --model "
            f"{model} --adapters NAME=PATH ..."
        )
    weights = fit(read, swappable.weights, swappable.filter_input) if swappable else {}
    if inputs is None:
        batches = default_inputs(base)
    elif isinstance(inputs, Path):
        batches = read_inputs(inputs, base, model.parent)
    else:
        batches = [complete(dict(batch), base) for batch in inputs]
    if foreign := sorted(set(names) - set(batches[0])):
        raise UserError(
            f"{model} takes {', '.join(names)}, but the base model {base.path} has no {', '.join(foreign)}. Expected a "
            "model that loratrf-export made from this adapter and base."
        )
    outputs = tuple(value.name or "" for value in graph.graph.outputs if not is_cache(value.name or ""))

    expected, base_off = [], []
    for number, batch in enumerate(batches, 1):
        step(f"running PyTorch, batch {number} of {len(batches)}")
        expected.append(run_torch(base, batch))
        base_off.append(run_torch(base, batch, adapter_on=False))
    if unknown := sorted(set(outputs) - set(expected[0])):
        raise UserError(
            f"{model} gives {', '.join(outputs)}, PyTorch's model gives {', '.join(expected[0])}: no counterpart for "
            f"{', '.join(unknown)}. Expected a model that loratrf-export made for the same task."
        )

    runs = {}
    for library in (True, False):
        variant = VARIANTS[0] if library else VARIANTS[1]
        step(f"running ONNX Runtime {variant}")
        runs[variant] = run_batches(
            model,
            batches,
            outputs,
            library=library,
            weights=weights,
            device=device,
            graph=graph if quantised else None,
        )
    refusals = [run for run in runs.values() if isinstance(run, UserError)]
    if len(refusals) == len(runs):
        raise refusals[-1]

    masks = [padding_mask(batch) for batch in batches]
    checks = [
        check
        for variant, run in runs.items()
        for check in parity_checks(variant, run, outputs, expected, masks, tolerance)
    ]
    worked = next(variant for variant, run in runs.items() if isinstance(run, list))
    checks += effect_checks(runs[worked], outputs, expected, base_off, masks, tolerance)  # type: ignore[arg-type]
    checks += weight_checks
    if swappable:
        step("running ONNX Runtime without an adapter")
        first = swappable.manifest["adapter"]
        default = expected
        if first.get("sha256") != read.sha256 and any(weight.default == "adapter" for weight in swappable.weights):
            run: list[Outputs] | UserError = NotComparable(
                f"the model's default has weights of the adapter that it was exported with, {first.get('name')}, and "
                "this is another one"
            )
        else:
            run = run_batches(model, batches, outputs, library=worked == VARIANTS[0], device=device)
        if swappable.default == "base":
            heads = {weight.module for weight in swappable.weights if not weight.in_layer and weight.default == "base"}
            default = [run_torch(base, batch, adapter_on=False, heads_off=heads) for batch in batches]
        checks += parity_checks(NO_ADAPTER, run, outputs, default, masks, tolerance)
    if generates:
        step("generating")
        checks += check_greedy(model, graph, base, tolerance)

    step("comparing layers")
    failed = next((check.variant for check in checks if check.status == "failed" and check.figures), worked)
    traced = worked if failed in (VARIANTS[2], NO_ADAPTER) else failed
    number = worst_batch(runs[traced], outputs, expected, masks)  # type: ignore[arg-type]
    layers: list[LayerError] = []
    skipped, layers_reason = 0, ""
    try:
        layers, skipped = compare_layers(
            graph,
            model,
            base,
            batches[number],
            weights=weights,
            library=traced == VARIANTS[0],
            device=device,
            mask=masks[number],
            tolerance=tolerance,
            # A bias of the low-rank half lies in the frozen layer's.
            folded=folded | {name for name, layer in read.layers.items() if layer.lora_bias is not None},
        )
    except Exception as error:  # the verdict stands without the picture: a runtime may refuse to give inner values
        layers_reason = f"layers could not be compared: {error}"
    return ParityReport(
        model=str(model),
        adapter=str(adapter),
        dtype=dtype,
        tolerance=tolerance,
        checks=tuple(checks),
        layers=tuple(layers),
        layers_variant=traced,
        layers_skipped=skipped,
        layers_reason=layers_reason,
        inputs=tuple({name: tuple(value.shape) for name, value in batch.items()} for batch in batches),
        versions=versions(),
        seconds=time.perf_counter() - begin,
    )


def _folded(adapter: Adapter, graph: ir.Model) -> set[str]:
    """Layers whose low-rank half lies in the weights of the graph, not in an operator."""
    ops = {node.metadata_props.get("module"): node.op_type for node in graph.graph if node.domain == DOMAIN}
    return {
        name
        for name, layer in adapter.layers.items()
        if layer.A is not None and "A" not in (OPS[ops[name]].inputs if ops.get(name) in OPS else ())
    }


def versions() -> dict[str, str]:
    from importlib import metadata

    from ..version import __version__

    packages = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "peft")
    versions = {"loratrf-deploy": __version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"python": platform.python_version(), "machine": platform.machine()}
