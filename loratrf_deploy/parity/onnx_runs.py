"""Running an exported model for comparison: as it is shipped, with the custom-op library and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..pytorch.base import Inputs, Outputs
from ..runtime.session import PROVIDERS, create_session, library_path, with_options

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime


__all__ = ["NotComparable", "is_cache", "load_graph", "model_dtype", "run_batches", "run_onnx", "session_in_memory"]


def run_onnx(
    session: onnxruntime.InferenceSession,
    batch: Inputs,
    outputs: Sequence[str] | None = None,
    weights: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Outputs by name, those named or all of the session's; floats are cast to the type that the graph takes.

    `weights` are fed as they are: those of an adapter, to a swappable model. A key/value cache starts empty.
    """
    rows = len(next(iter(batch.values())))
    feeds = dict(weights or {})
    for value in session.get_inputs():
        if is_cache(value.name):  # (batch, heads, past, head width)
            array = np.zeros((rows, value.shape[1], 0, value.shape[3]), np.float32)
        else:
            array = batch[value.name]
        feeds[value.name] = array.astype(np.float16) if value.type == "tensor(float16)" else array
    names = list(outputs) if outputs is not None else [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def is_cache(name: str) -> bool:
    """Whether a graph's input or output `name` is a key/value cache, which PyTorch's model keeps to itself."""
    return name.startswith(("past_key_values.", "present."))


def session_in_memory(
    graph: ir.Model, model: Path, *, library: bool, device: str = "cpu"
) -> onnxruntime.InferenceSession:
    """A session of `graph` on `device`; its weights lie in the folder of `model`.

    The graph goes to ONNX Runtime in memory, so nothing is written: the model's folder may be read-only.
    """
    import onnx_ir as ir
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    if library:
        options.register_custom_ops_library(str(library_path()))
    content = ir.to_proto(graph).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=with_options([PROVIDERS[device]]))


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
            return NotComparable(str(error))
    try:
        if graph is None:
            session = create_session(model, library=library, providers=[PROVIDERS[device]])
        else:
            session = session_in_memory(graph, model, library=library)
        return [run_onnx(session, batch, outputs, weights) for batch in batches]
    except UserError as error:
        return error
    except Exception as error:  # onnxruntime's exceptions share no public base class
        return UserError(f"ONNX Runtime fails in {model}: {error}")


class NotComparable(UserError):
    """What is needed for a comparison is absent, such as the custom-op library: it is skipped, not failed."""
