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

import numpy as np
from numpy.typing import NDArray

from ..adapters.weights_file import some
from ..errors import UserError
from ..formats.swappable import fit, read_swappable
from ..ops.schemas import DOMAIN, OPS
from ..runtime.session import PROVIDERS, check_providers, create_session, library_path
from . import greedy as _parity_generation
from . import inputs as _parity_inputs
from . import layers as _parity_layers
from .figures import Figures, compare, valid, worst
from .result import NO_ADAPTER, VARIANTS, Check, LayerError, ParityReport

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..adapters.adapter import Adapter
    from ..pytorch.base import BaseModel

__all__ = ["EFFECT", "TOLERANCES", "VARIANTS", "Check", "LayerError", "ParityReport", "check_parity"]

TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest relative error, max|a-b| / max|b|, by dtype of the weights; bfloat16 is 8 times as coarse as float16."""

GENERATION_TOLERANCE = 1e-4
"""Of float32 causal language models: rounding adds up over many more layers than an encoder has."""

EFFECT = 10.0
"""The adapter has an effect where it changes an output by more than this many tolerances."""

Inputs = dict[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]]


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
    from ..adapters.adapter import read_adapter
    from ..pytorch.base import load_reference

    begin = time.perf_counter()
    model = Path(model)
    check_providers([PROVIDERS[device]])
    step("reading the model")
    graph = load_graph(model)
    dtype = model_dtype(graph)
    generates = _parity_generation.is_generating(model)
    if tolerance is None:
        tolerance = GENERATION_TOLERANCE if generates and dtype == "float32" else TOLERANCES.get(dtype, 1e-5)
    read = read_adapter(adapter)
    step("loading PyTorch's model")
    folded = _folded(read, graph)
    base = reference or load_reference(read, base_model, dtype=dtype, merge=bool(folded))
    quantised = _parity_generation.exact_arithmetic(graph)
    weight_checks = []
    if quantised:
        step("dequantising")
        merged = bool(folded or read.not_separable)
        weight_checks = [_parity_generation.dequantise_reference(graph, base, read, merged=merged)]
    names = [
        name
        for value in graph.graph.inputs
        if (name := value.name or "") not in graph.graph.initializers and not _parity_layers.is_cache(name)
    ]
    swappable = read_swappable(model) if any(v.name in graph.graph.initializers for v in graph.graph.inputs) else None
    if swappable and swappable.slots:
        raise UserError(
            f"{model} holds several adapters ({some(swappable.slots)}). Compare them all: loratrf-parity --model "
            f"{model} --adapters NAME=PATH ..."
        )
    weights = fit(read, swappable.weights, swappable.filter_input) if swappable else {}
    if inputs is None:
        batches = _parity_inputs.default_inputs(base)
    elif isinstance(inputs, Path):
        batches = _parity_inputs.read_inputs(inputs, base, model.parent)
    else:
        batches = [_parity_inputs.complete(dict(batch), base) for batch in inputs]
    if foreign := sorted(set(names) - set(batches[0])):
        raise UserError(
            f"{model} takes {', '.join(names)}, but the base model {base.path} has no {', '.join(foreign)}. Expected a "
            "model that loratrf-export made from this adapter and base."
        )
    outputs = tuple(value.name or "" for value in graph.graph.outputs if not _parity_layers.is_cache(value.name or ""))

    expected, base_off = [], []
    for number, batch in enumerate(batches, 1):
        step(f"running PyTorch, batch {number} of {len(batches)}")
        expected.append(_parity_layers.run_torch(base, batch))
        base_off.append(_parity_layers.run_torch(base, batch, adapter_on=False))
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

    masks = [_parity_inputs.padding_mask(batch) for batch in batches]
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
            run: list[Outputs] | UserError = _NotComparable(
                f"the model's default has weights of the adapter that it was exported with, {first.get('name')}, and "
                "this is another one"
            )
        else:
            run = run_batches(model, batches, outputs, library=worked == VARIANTS[0], device=device)
        if swappable.default == "base":
            heads = {weight.module for weight in swappable.weights if not weight.in_layer and weight.default == "base"}
            default = [_parity_layers.run_torch(base, batch, adapter_on=False, heads_off=heads) for batch in batches]
        checks += parity_checks(NO_ADAPTER, run, outputs, default, masks, tolerance)
    if generates:
        step("generating")
        checks += _parity_generation.check_greedy(model, graph, base, tolerance)

    step("comparing layers")
    failed = next((check.variant for check in checks if check.status == "failed" and check.figures), worked)
    traced = worked if failed in (VARIANTS[2], NO_ADAPTER) else failed
    number = _worst_batch(runs[traced], outputs, expected, masks)  # type: ignore[arg-type]
    layers: list[LayerError] = []
    skipped, layers_reason = 0, ""
    try:
        layers, skipped = _parity_layers.compare_layers(
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


def model_dtype(model: ir.Model) -> str:
    """The float type that most of the model's weights have, by number of values: "float32", "float16", "bfloat16"."""
    import onnx_ir as ir

    names = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
    sizes: dict[str, int] = {}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point():
            name = names.get(tensor.dtype, "float32")
            sizes[name] = sizes.get(name, 0) + tensor.size
    return max(sizes, key=lambda name: sizes[name], default="float32")


def _folded(adapter: Adapter, graph: ir.Model) -> set[str]:
    """Layers whose low-rank half lies in the weights of the graph, not in an operator."""
    ops = {node.metadata_props.get("module"): node.op_type for node in graph.graph if node.domain == DOMAIN}
    return {
        name
        for name, layer in adapter.layers.items()
        if layer.A is not None and "A" not in (OPS[ops[name]].inputs if ops.get(name) in OPS else ())
    }


def load_graph(model: Path) -> ir.Model:
    import onnx_ir as ir

    if not model.is_file():
        raise UserError(f"No model at {model}: expected an ONNX file, such as the --out of loratrf-export.")
    try:
        return ir.load(model)
    except Exception as error:  # protobuf and onnx_ir raise many classes
        raise UserError(
            f"{model} is not a readable ONNX model ({error}). Export it again with loratrf-export."
        ) from error


def run_batches(
    model: Path,
    batches: Sequence[Inputs],
    outputs: Sequence[str],
    *,
    library: bool,
    weights: Mapping[str, NDArray[Any]] | None = None,
    device: str = "cpu",
    graph: ir.Model | None = None,
) -> list[Outputs] | UserError:
    """Outputs by batch on `device`, with the run-time `weights`; a UserError where the library isn't built, or ONNX
    Runtime refuses model or inputs.

    `graph` stands for the model in the file: the same one, made to compute exactly, on the CPU.
    """
    if library:
        try:
            library_path()
        except UserError as error:
            return _NotComparable(str(error))
    try:
        if graph is None:
            session = create_session(model, library=library, providers=[PROVIDERS[device]])
        else:
            session = _parity_layers.session_in_memory(graph, model, library=library)
        return [_parity_layers.run_onnx(session, batch, outputs, weights) for batch in batches]
    except UserError as error:
        return error
    except Exception as error:  # onnxruntime's exceptions share no public base class
        return UserError(f"ONNX Runtime fails in {model}: {error}")


class _NotComparable(UserError):
    """What is needed for a comparison is absent, such as the custom-op library: it is skipped, not failed."""


def parity_checks(
    variant: str,
    run: list[Outputs] | UserError,
    outputs: Sequence[str],
    expected: Sequence[Outputs],
    masks: Sequence[NDArray[np.bool_] | None],
    tolerance: float,
) -> list[Check]:
    if isinstance(run, UserError):
        status = "skipped" if isinstance(run, _NotComparable) else "failed"
        return [Check(variant, name, status, str(run)) for name in outputs]
    checks = []
    for name in outputs:
        figures = _over_batches(run, expected, name, masks, tolerance)
        if any(got[name].shape != right[name].shape for got, right in zip(run, expected, strict=True)):
            reason = f"shape {run[0][name].shape}, PyTorch gives {expected[0][name].shape}"
        elif np.isnan(figures.relative):
            reason = "PyTorch's own output has NaN or Inf, so nothing can be compared"
        elif np.isinf(figures.absolute):
            reason = "NaN or Inf where PyTorch's output is finite"
        elif figures.relative > tolerance:
            reason = f"relative error {figures.relative:.2e}, tolerance {tolerance:g}"
        elif figures.flips:
            reason = f"{figures.flips} of {figures.choices} top-1 answers differ"
        else:
            reason = ""
        checks.append(Check(variant, name, "failed" if reason else "passed", reason, figures))
    return checks


def effect_checks(
    run: list[Outputs],
    outputs: Sequence[str],
    expected: Sequence[Outputs],
    base_off: Sequence[Outputs],
    masks: Sequence[NDArray[np.bool_] | None],
    tolerance: float,
) -> list[Check]:
    """Whether the export differs from PyTorch with the adapter's layers off by clearly more than the tolerance."""
    checks = []
    for name in outputs:
        exported = _over_batches(run, base_off, name, masks, tolerance)
        true = _over_batches(expected, base_off, name, masks, tolerance).relative
        status, reason = "passed", ""
        if not exported.relative > EFFECT * tolerance:
            if true > EFFECT * tolerance:
                status = "failed"
                reason = (
                    f"the export equals the base model without the adapter (relative difference "
                    f"{exported.relative:.2e}); in PyTorch the adapter makes a difference of {true:.2e}"
                )
            else:
                status = "no effect"
                reason = (
                    f"the adapter itself changes nothing that could be told from rounding: relative difference "
                    f"{true:.2e} in PyTorch, looked for more than {EFFECT * tolerance:g}"
                )
        checks.append(Check(VARIANTS[2], name, status, reason, exported))
    return checks


def _over_batches(
    run: Sequence[Outputs],
    expected: Sequence[Outputs],
    name: str,
    masks: Sequence[NDArray[np.bool_] | None],
    tolerance: float,
) -> Figures:
    """Figures over all batches together: a row with an undecided answer, scores near 0, has no scale of its own."""
    compared = [valid(right[name], mask, name) for right, mask in zip(expected, masks, strict=True)]
    scale = max(float(np.abs(value.astype(np.float64)).max(initial=0.0)) for value in compared)
    return worst(
        [
            compare(got[name], right[name], name=name, mask=mask, tolerance=tolerance, scale=scale)
            for got, right, mask in zip(run, expected, masks, strict=True)
        ]
    )


def _worst_batch(
    run: list[Outputs],
    outputs: Sequence[str],
    expected: Sequence[Outputs],
    masks: Sequence[NDArray[np.bool_] | None],
) -> int:
    def error(number: int) -> float:
        got, right = run[number], expected[number]
        figures = [compare(got[name], right[name], name=name, mask=masks[number]) for name in outputs]
        return max(np.inf if np.isnan(entry.absolute) else entry.absolute for entry in figures)

    return max(range(len(run)), key=error)


def versions() -> dict[str, str]:
    from importlib import metadata

    from .. import __version__

    packages = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers", "peft")
    versions = {"loratrf-deploy": __version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"python": platform.python_version(), "machine": platform.machine()}
