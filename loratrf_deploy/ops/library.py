"""Where the compiled operators are: the custom-op library that ONNX Runtime loads."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError

__all__ = ["is_built", "library_path"]

_PATH = Path(__file__).parents[1] / "libloratrf_ort.so"


def is_built() -> bool:
    """Whether the custom-op library is there."""
    return _PATH.is_file()


def library_path() -> Path:
    """Path of the ONNX Runtime custom-op library: `SessionOptions.register_custom_ops_library(str(library_path()))`.

    Raises UserError where the package was installed without building it.
    """
    if not is_built():
        raise UserError(
            f"The custom-op library is not built: {_PATH} does not exist. Build it with `pip install .` from the "
            "repository (needs a C++17 compiler and cmake), or open the model without it (library=False): operators "
            "then run by their definitions in the file."
        )
    return _PATH
