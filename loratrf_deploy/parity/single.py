"""Does an exported model compute what PyTorch computed? The proof, in five steps; `reports` shows what it finds.

The oracle is PEFT's own model in float32. ONNX Runtime runs the export with the custom-op library and without it, and a
third comparison switches the adapter off in PyTorch: an export that equals the bare base has lost its adapter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..adapters.adapter import Adapter
from ..ops.schemas import Device
from .case import prepare
from .checks import judge
from .evaluation import evaluate
from .greedy import check_greedy
from .layers import trace_layers
from .onnx_runs import run_onnx
from .result import LIBRARY, ParityReport, Step, versions
from .rounding import rounding_checks
from .stages import check_stages
from .torch_runs import run_pytorch

__all__ = ["check_parity"]


def check_parity(
    model: str | Path,
    adapter: Adapter | str | Path,
    base_model: str | Path | None = None,
    inputs: Sequence[Mapping[str, NDArray[Any]]] | Path | None = None,
    *,
    evaluate_on: Path | None = None,
    max_loss: float | None = None,
    tolerance: float | None = None,
    device: Device = "cpu",
    trust_remote_code: bool = False,
    step: Step = lambda text: None,
) -> ParityReport:
    """max|onnx - torch| / max|torch| <= tolerance for every output, with and without the library; and onnx ≠ base.

    `adapter` is a folder, or what `read_adapter` gave. `inputs`: batches by input name, ids (batch, sequence) integers
    or pixels (batch, channels, H, W); or a JSON-lines file of texts or arrays; None makes random ones of several sizes,
    padding included. `evaluate_on`: such a file with labels, on whose rows answers are counted; the proof fails where
    more than `max_loss` percent of them differ. `tolerance` None takes the one of the model's dtype. The base's weights
    are rounded to the model's dtype, the arithmetic is float32. Both maxima are over all batches; where an output has a
    row per token, padded tokens are left out (nothing reads them, and attention libraries differ on them), but must be
    finite. A swappable model is given the adapter's weights as --onto converts them, and is also run without. `device`
    "cuda" runs ONNX Runtime on the GPU; PyTorch stays on the CPU. `trust_remote_code` runs Python that the base model
    and the tokenizer bring, which is otherwise refused. Raises UserError where model, adapter, base or inputs are at
    fault; a model that doesn't compute the same is a report.
    """
    begin = time.perf_counter()
    case = prepare(
        Path(model),
        adapter,
        base_model,
        inputs,
        tolerance=tolerance,
        device=device,
        trust_remote_code=trust_remote_code,
        step=step,
    )
    expected = run_pytorch(case, step)
    runs = run_onnx(case, step)
    checks = judge(case, expected, runs)
    if case.quantised:
        step("rounding to int8")
        library = LIBRARY[runs.worked]
        checks += rounding_checks(
            case.model,
            case.fed,
            case.outputs,
            lambda run, name: (run, expected.on, case.masks),
            case.weights,
            library=library,
        )
    if evaluate_on is not None:
        library = LIBRARY[runs.worked]
        checks.append(evaluate(case, evaluate_on, base_model, step, max_loss=max_loss, library=library))
    if case.genai_config is not None:
        step("generating")
        checks += check_greedy(case)
    if case.stages is not None:
        checks += check_stages(case, expected, step)
    step("comparing layers")
    trace = trace_layers(case, expected, runs, checks)
    return ParityReport(
        model=str(model),
        adapter=str(case.adapter.path),
        dtype=case.dtype,
        tolerance=case.tolerance,
        checks=tuple(checks),
        layers=trace.layers,
        layers_variant=trace.variant,
        layers_skipped=trace.skipped,
        layers_reason=trace.reason,
        inputs=tuple({name: tuple(value.shape) for name, value in batch.items()} for batch in case.batches),
        versions=versions(),
        seconds=time.perf_counter() - begin,
    )
