"""Where the compiled operators are: the custom-op library that ONNX Runtime loads."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError

__all__ = ["library_path"]


def library_path() -> Path:
    """Path of the ONNX Runtime custom-op library: `SessionOptions.register_custom_ops_library(str(library_path()))`.

    Raises UserError where the package was installed without building it.
    """
    path = Path(__file__).parents[1] / "libloratrf_ort.so"
    if not path.is_file():
        raise UserError(
            f"The custom-op library is not built: {path} does not exist. Build it with `pip install .` from the "
            "repository (needs a C++17 compiler and cmake), or open the model without it (library=False): operators "
            "then run by their definitions in the file."
        )
    return path
