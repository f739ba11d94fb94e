"""The third step of a parity check: the exported model in ONNX Runtime, with the custom-op library and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, some
from ..formats.tasks import label_count, lowest
from ..genai.names import POSITION_IDS, is_cache
from ..ops.schemas import ADAPTER_IDS, Device
from ..pytorch.base import Inputs, Outputs
from ..runtime.session import PROVIDERS, create_session, library_path, with_options
from .case import Case
from .result import LIBRARY, NO_ADAPTER, Step, Variant

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime

__all__ = [
    *("NotComparable", "OnnxRuns", "Run", "run_batches", "run_onnx", "run_session", "session_in_memory"),
    *("no_library", "with_encoder", "without_room"),
]

Run: TypeAlias = "list[Outputs] | UserError"
"""Outputs by batch, or why there are none."""


class NotComparable(UserError):
    """What is needed for a comparison is absent, such as the custom-op library: it is skipped, not failed."""


@dataclass(frozen=True)
class OnnxRuns:
    """What each variant gave; `outputs` are those of `worked`, the first one of them that ran."""

    by_variant: dict[Variant, Run]
    worked: Variant
    outputs: list[Outputs]


def run_onnx(case: Case, step: Step) -> OnnxRuns:
    """Every batch of `case` with the library and without; a swappable model also without an adapter, if it may be.

    Raises UserError where ONNX Runtime runs it neither way.
    """
    runs: dict[Variant, Run] = {}
    graph = case.graph if case.quantised else None
    for variant, library in LIBRARY.items():
        step(f"running ONNX Runtime {variant}")
        batches = with_encoder(case, library=library)
        run: Run
        if isinstance(batches, UserError):
            run = batches
        else:
            run = run_batches(
                case.model, batches, case.outputs, library, case.device, weights=case.weights, graph=graph
            )
        runs[variant] = _own_labels(run, case)
    ran = {variant: run for variant, run in runs.items() if isinstance(run, list)}
    if not ran:
        raise next(run for run in reversed(runs.values()) if isinstance(run, UserError))
    worked = next(iter(ran))
    if case.manifest is not None and not (case.manifest.swappable and case.manifest.swappable.default == "required"):
        step("running ONNX Runtime without an adapter")
        batches = [_without_adapter(batch) for batch in case.fed] if case.grouped else case.fed
        runs[NO_ADAPTER] = _foreign_default(case) or run_batches(
            case.model, batches, case.outputs, LIBRARY[worked], case.device, graph=graph
        )
    return OnnxRuns(runs, worked, ran[worked])


def _own_labels(run: Run, case: Case) -> Run:
    """`run` with the labels that the adapter has, where the model has room for more."""
    labels = label_count(case.adapter)
    if isinstance(run, UserError) or not case.room or labels is None:
        return run
    return [
        {name: without_room(value, labels) if "logits" in name else value for name, value in outputs.items()}
        for outputs in run
    ]


def without_room(value: NDArray[Any], labels: int) -> NDArray[Any]:
    """`value` (..., N) with its first `labels`; as it is where what it has for the others isn't the lowest number."""
    room = value[..., labels:]
    return value[..., :labels] if (room == lowest(value.dtype)).all() else value


def with_encoder(case: Case, *, library: bool) -> Sequence[Inputs] | UserError:
    """The batches of `case` with what its encoder makes of each, where it has one; why there are none."""
    if case.stages is None or case.stages.encoder is None:
        return case.fed
    made = run_batches(case.stages.encoder, case.fed, None, library, case.device)
    if isinstance(made, UserError):
        return made
    return [batch | own for batch, own in zip(case.fed, made, strict=True)]


def _without_adapter(batch: Inputs) -> Inputs:
    return batch | {ADAPTER_IDS: np.full(len(next(iter(batch.values()))), -1)}


def _foreign_default(case: Case) -> NotComparable | None:
    """Why the model without an adapter can't be compared: it has weights of another one then, or heads of nobody."""
    assert case.manifest is not None
    swappable, first = case.manifest.swappable, case.manifest.adapter
    if case.grouped and case.base.untrained:
        return NotComparable(
            f"the base has no {some(case.base.untrained)} of its own, and rows of no adapter get zeros"
        )
    if case.room:
        return NotComparable(
            "the base's head for as many labels as this adapter has is not in the model, which has room for more"
        )
    if first.sha256 == case.adapter.sha256 or not swappable or case.grouped:
        return None
    if not any(weight.default == "adapter" for weight in swappable.weights):
        return None
    return NotComparable(
        f"the model's default has weights of the adapter that it was exported with, {first.name}, and this is another "
        "one"
    )


def no_library() -> NotComparable | None:
    """Why nothing can run with the custom-op library here, None where it can."""
    try:
        library_path()
    except UserError as error:
        return NotComparable(str(error))
    return None


def run_batches(
    model: Path,
    batches: Sequence[Inputs],
    outputs: Sequence[str] | None,
    library: bool,
    device: Device = "cpu",
    *,
    weights: Mapping[str, NDArray[Any]] | None = None,
    graph: ir.Model | None = None,
) -> Run:
    """Outputs by batch on `device`, with the run-time `weights`; a UserError where the library isn't built, or ONNX
    Runtime refuses model or inputs.

    `graph` stands for the model in the file: the same one, made to compute exactly, on the CPU.
    """
    if library and (absent := no_library()):
        return absent
    try:
        if graph is None:
            session = create_session(model, library=library, providers=[PROVIDERS[device]])
        else:
            session = session_in_memory(graph, model, library=library)
        return [run_session(session, batch, outputs, weights) for batch in batches]
    except UserError as error:
        return error
    except Exception as error:  # onnxruntime's exceptions share no public base class
        return UserError(f"ONNX Runtime fails in {model}: {error}")


def run_session(
    session: onnxruntime.InferenceSession,
    batch: Inputs,
    outputs: Sequence[str] | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> Outputs:
    """Outputs by name, those named or all of the session's; floats are cast to the type that the graph takes.

    `weights` are fed as they are: those of an adapter, to a swappable model; where rows name slots and `batch` doesn't,
    all take the first. A cache starts empty, of convolutions with zeros; positions count from 0.
    """
    rows = len(next(iter(batch.values())))
    feeds = dict(weights or {})
    for value in session.get_inputs():
        if value.name in feeds:
            continue
        if is_cache(value.name):  # (batch, heads, past, head width), or (batch, channels, width - 1) of convolutions
            array = np.zeros([rows, *(size if isinstance(size, int) else 0 for size in value.shape[1:])], np.float32)
        elif value.name == POSITION_IDS and POSITION_IDS not in batch:
            ids = batch["input_ids"]
            axes = value.shape[:-2]  # Qwen-VL counts along time, height and width: of texts the same
            array = np.broadcast_to(np.arange(ids.shape[1]), (*axes, *ids.shape))
        elif value.name == ADAPTER_IDS:
            array = batch.get(ADAPTER_IDS, np.zeros(rows, np.int64))
        else:
            array = batch[value.name]
        feeds[value.name] = array.astype(np.float16) if value.type == "tensor(float16)" else array
    names = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def session_in_memory(
    graph: ir.Model, model: Path, *, library: bool, device: Device = "cpu"
) -> onnxruntime.InferenceSession:
    """A session of `graph` on `device`; its weights lie in the folder of `model`.

    The graph goes to ONNX Runtime in memory, so nothing is written: the model's folder may be read-only.
    """
    import onnx_ir as ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    if library:
        options.register_custom_ops_library(str(library_path()))
    content = ir.to_proto(graph).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=with_options([PROVIDERS[device]]))
