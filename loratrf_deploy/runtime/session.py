"""Opening an exported model in ONNX Runtime, with or without the custom-op library. Needs neither torch nor onnx."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from ..onnx_file import check_external_data
from ..ops.library import library_path
from ..ops.schemas import Device

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    *("PROVIDERS", "OwnProcess", "check_providers", "create_session", "library_path", "quiet_options", "with_options"),
]

PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""ONNX Runtime's execution providers by the device names of the command lines."""

_OPTIONS = {PROVIDERS["cuda"]: {"use_tf32": "0"}}
"""By provider. float32 stays float32, as in PyTorch: ONNX Runtime's own choice rounds products' factors to 10 bits,
and no float32 export's parity survives that."""


def create_session(
    model: str | Path,
    *,
    library: bool = True,
    providers: Sequence[str] = (PROVIDERS["cpu"],),
    options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on `model`; its loratrf operators run as fused kernels with `library`, else as functions.

    `options` are used as given, with the library added; what no provider of `providers` computes is left to the CPU.
    Raises UserError where onnxruntime, a provider, the model or the library is missing, or ONNX Runtime refuses the
    model.
    """
    check_providers(providers)
    import onnxruntime

    if not os.path.isfile(model):
        raise UserError(f"No model at {model}: expected an ONNX file, such as the --out of loratrf-export.")
    check_external_data(Path(model))
    options = quiet_options() if options is None else options
    if PROVIDERS["cuda"] in providers:
        # It looks for the libraries that pip installed; what it misses it prints.
        with contextlib.redirect_stdout(io.StringIO()):
            onnxruntime.preload_dlls()
    if library:
        options.register_custom_ops_library(str(library_path()))
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=with_options(providers))
    except Exception as error:  # onnxruntime's exceptions share no public base class
        raise UserError(f"ONNX Runtime {onnxruntime.__version__} refuses {model}: {error}") from error
    # A provider that fails to start is only a warning to ONNX Runtime: the session would silently run on the CPU.
    if missing := [provider for provider in providers if provider not in session.get_providers()]:
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} can't start {', '.join(missing)} here: {_why_no_gpu()}"
        )
    return session


def _why_no_gpu() -> str:
    """The library that ONNX Runtime's provider for CUDA misses first; where it misses none, what else it needs."""
    import onnxruntime

    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        name = str(error).partition(":")[0]
        if name.startswith("libcuda.so"):
            return f"{name} is not to be found, which comes with the NVIDIA GPU's driver. `nvidia-smi` shows both."
        if name != str(provider):
            return (
                f"{name} is not to be found. `pip install 'loratrf-deploy[gpu]'` brings it, with CUDA's and cuDNN's "
                "other libraries; the NVIDIA GPU's driver must be one for them (580 or later for CUDA 13)."
            )
    return (
        "it needs an NVIDIA GPU, its driver, and the CUDA and cuDNN libraries of the version that this onnxruntime-gpu "
        "was built for. `nvidia-smi` shows the GPU and the driver."
    )


def quiet_options(threads: int = 0) -> onnxruntime.SessionOptions:
    """Options without a log: what goes wrong is an exception, and the log would print a stranger's names raw.

    `threads` are those of a run, 0 as many as the CPU has cores.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return options


def with_options(providers: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """The execution providers as sessions here open them."""
    return [(provider, _OPTIONS.get(provider, {})) for provider in providers]


class OwnProcess:
    """The process in which a session is made. ONNX Runtime's threads, and threads that hold a lock, don't follow a
    fork: what is run there may wait for them for ever."""

    def __init__(self, what: str):
        self._what, self._id = what, os.getpid()

    def check(self) -> None:
        """RuntimeError in any other process."""
        if os.getpid() != self._id:
            raise RuntimeError(
                f"This {self._what} was made in process {self._id} and is used in {os.getpid()}, which was forked from "
                "it: ONNX Runtime's threads stayed there, and a run could wait for them for ever. Make the session in "
                "each process, after the fork, or start processes that begin anew: "
                'multiprocessing.get_context("spawn").'
            )


def check_providers(providers: Sequence[str]) -> None:
    """Raises UserError, saying what to install, unless ONNX Runtime is installed and built with all of `providers`."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(
            "ONNX Runtime is not installed. Install one of them: `pip install 'loratrf-deploy[cpu]'` or "
            "`pip install 'loratrf-deploy[gpu]'`."
        ) from error
    available = onnxruntime.get_available_providers()
    missing = [provider for provider in providers if provider not in available]
    if PROVIDERS["cuda"] in missing:
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} is installed here without {PROVIDERS['cuda']}. Put the GPU "
            "build in its place: `pip uninstall onnxruntime`, then `pip install 'loratrf-deploy[gpu]'`; it needs an "
            "NVIDIA GPU."
        )
    if missing:
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} here has no {', '.join(missing)}; it has {', '.join(available)}."
        )
