"""Opening an exported model in ONNX Runtime, with or without the custom-op library. Needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["create_session", "library_path"]


def library_path() -> Path:
    """Path of the ONNX Runtime custom-op library: `SessionOptions.register_custom_ops_library(str(library_path()))`.

    Raises UserError where the package was installed without building it.
    """
    path = Path(__file__).with_name("libloratrf_ort.so")
    if not path.is_file():
        raise UserError(
            f"The custom-op library is not built: {path} does not exist. Build it with `pip install .` from the "
            "repository (needs a C++17 compiler and cmake), or open the model without it (library=False): results are "
            "the same, only slower."
        )
    return path


def create_session(
    model: str | Path,
    *,
    library: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on `model`; its loratrf operators run as fused kernels with `library`, else as functions.

    `options` are used as given, with the library added. Raises UserError where onnxruntime, the model or the library
    is missing, or ONNX Runtime refuses the model.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(
            "ONNX Runtime is not installed. Install one of them: `pip install 'loratrf-deploy[cpu]'` or "
            "`pip install 'loratrf-deploy[gpu]'`."
        ) from error

    if not Path(model).is_file():
        raise UserError(f"No model at {model}: expected an ONNX file, such as the --out of loratrf-export.")
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library_path()))
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise UserError(f"ONNX Runtime {onnxruntime.__version__} refuses {model}: {error}") from error
