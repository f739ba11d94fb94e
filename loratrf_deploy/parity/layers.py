"""The last step of a parity check: the outputs of torch modules held against the ONNX nodes that compute them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..ops.schemas import Device
from ..pytorch.oracle import plain_name, run_torch
from ..pytorch.shared import named_as
from .case import Case
from .checks import worst_batch
from .figures import relative_error, valid
from .onnx_runs import OnnxRuns, run_session, session_in_memory, with_encoder
from .result import LIBRARY, Check, LayerError, LayerTrace
from .torch_runs import TorchOutputs

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime
    import torch

__all__ = ["compare_layers", "trace_layers"]


def trace_layers(case: Case, expected: TorchOutputs, runs: OnnxRuns, checks: Sequence[Check]) -> LayerTrace:
    """Error by layer under the first variant that failed, else the first that ran, on the batch with the largest error.

    The verdict stands without this picture: where a runtime refuses to give inner values, `reason` says so.
    """
    failed = next((check.variant for check in checks if check.status == "failed" and check.figures), runs.worked)
    variant = failed if failed in LIBRARY else runs.worked
    run = runs.by_variant[variant]
    assert isinstance(run, list)  # a check with figures
    number = worst_batch(run, case.outputs, expected.on, case.masks)
    try:
        layers, skipped = compare_layers(case, number, library=LIBRARY[variant])
    except Exception as error:
        return LayerTrace(variant, reason=f"layers could not be compared: {error}")
    return LayerTrace(variant, tuple(layers), skipped)


def compare_layers(case: Case, number: int, *, library: bool) -> tuple[list[LayerError], int]:
    """Error of every module that both sides compute, in the graph's order, then of the outputs; and the number skipped.

    On batch `number` of `case`, whose graph is unchanged on return. A module is compared where it is a leaf or an
    adapted layer of the torch model, a node bears its name, and the shapes agree: fusions leave some without a value
    of their own. The frozen layers inside folded ones are left out: in the graph they hold the adapter too.
    """
    batch, mask = case.batches[number], case.masks[number]
    nodes = _nodes_by_module(case.graph)
    for name in case.folded:
        nodes.pop(f"{name}.base_layer", None)
    with _recorded(case.base.model, set(nodes)) as seen:
        expected = named_as(run_torch(case.base, batch), case.part)
    chosen = {name: nodes[name] for name in seen}
    session, names = _session_with_outputs(case.graph, case.model, chosen, library, case.device)
    entered = with_encoder(replace(case, fed=(case.fed[number],)), library=library)
    if isinstance(entered, UserError):
        raise entered
    got = run_session(session, entered[0], weights=case.weights)

    layers, skipped = [], 0
    for name, node in nodes.items():
        if name not in seen:
            continue
        a, b = got[names[name]], seen[name].value(node.op_type)
        if a.shape != b.shape or not a.size:
            skipped += 1
            continue
        layers.append(_error(name, node.op_type, a, b, mask, case.tolerance))
    for name in expected:
        if name in got and got[name].shape == expected[name].shape:
            layers.append(_error(name, "output", got[name], expected[name], mask, case.tolerance, output=name))
    return layers, skipped


def _error(
    name: str,
    op: str,
    a: NDArray,
    b: NDArray,
    mask: NDArray[np.bool_] | None,
    tolerance: float,
    output: str = "",
) -> LayerError:
    relative, absolute = relative_error(valid(a, mask, output), valid(b, mask, output))
    # A NaN in PyTorch is no drift of the export's.
    return LayerError(name, op, relative, absolute, drifts=not math.isnan(relative) and relative > tolerance)


def _nodes_by_module(graph: ir.Model) -> dict[str, ir.Node]:
    """The last node of each module, in the order in which they run."""
    last: dict[str, tuple[int, ir.Node]] = {}
    for position, node in enumerate(graph.graph):
        if name := node.metadata_props.get("module"):
            last[name] = (position, node)
    return {name: node for name, (_, node) in sorted(last.items(), key=lambda item: item[1][0])}


class _Seen:
    """A torch module's output, and the bias in it."""

    def __init__(self, output: torch.Tensor, bias: torch.Tensor | None):
        self.output, self.bias = output, bias

    def value(self, op: str) -> NDArray[Any]:
        # The exporter fuses some biases into the operator behind (BiasGelu, attention): the MatMul is without it.
        without = self.bias is not None and op == "MatMul"
        return (self.output - self.bias if without and self.bias is not None else self.output).numpy()


@contextlib.contextmanager
def _recorded(model: torch.nn.Module, names: set[str]) -> Iterator[dict[str, _Seen]]:
    """Yields what the modules `names` put out while inside; the last call counts."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    seen: dict[str, _Seen] = {}
    handles = []

    def record(name: str, bias: torch.Tensor | None) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor):
                seen[name] = _Seen(output.detach().clone(), bias)

        return hook

    for path, module in model.named_modules():
        # A container's name is also borne by stray nodes (reshapes, residuals) that are not its output.
        if not isinstance(module, BaseTunerLayer) and next(module.children(), None) is not None:
            continue
        name = plain_name(path)
        if name in names:
            handles.append(module.register_forward_hook(record(name, _bias(module))))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _bias(module: torch.nn.Module) -> torch.Tensor | None:
    """The constant in a linear layer's output, the low-rank half's own bias included; None where there is none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(module, BaseTunerLayer):
        bias = getattr(module, "bias", None)
        return None if bias is None else bias.detach()
    total = _bias(module.get_base_layer())
    for name, half in getattr(module, "lora_B", {}).items():
        if getattr(half, "bias", None) is not None:
            own = module.scaling[name] * half.bias.detach()  # type: ignore[index]
            total = own if total is None else total + own
    return total


def _session_with_outputs(
    graph: ir.Model, model: Path, nodes: dict[str, ir.Node], library: bool, device: Device = "cpu"
) -> tuple[onnxruntime.InferenceSession, dict[str, str]]:
    """A session that also gives the first output of `nodes`, and module -> output name."""
    outputs = graph.graph.outputs
    before = len(outputs)
    names = {module: node.outputs[0].name or "" for module, node in nodes.items()}
    try:
        outputs.extend(
            {value.name: value for node in nodes.values() if (value := node.outputs[0]) not in outputs}.values()
        )
        return session_in_memory(graph, model, library=library, device=device), names
    finally:
        del outputs[before:]
