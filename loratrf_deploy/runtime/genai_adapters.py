"""Adapters in onnxruntime-genai's memory."""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..errors import UserError
from ..formats.adapter_file import SUFFIX, write_values

if TYPE_CHECKING:
    import onnxruntime_genai as og

__all__ = ["GenaiAdapters", "Placed"]


class Placed:
    """Weights that onnxruntime-genai holds under a key of their own, for as long as anybody refers to this object."""

    def __init__(self, adapters: og.Adapters, key: str):
        self.active = (adapters, key)


class GenaiAdapters:
    """What `og.Adapters` holds of one model. Any thread."""

    def __init__(self, model: og.Model):
        import onnxruntime_genai as og

        if not hasattr(og, "Adapters"):
            raise UserError(
                f"onnxruntime-genai {og.__version__} knows no adapters. Install one that does: "
                "`pip install 'onnxruntime-genai>=0.18'`."
            )
        self._adapters, self._keys = og.Adapters(model), itertools.count()

    def place(self, values: Mapping[str, NDArray[Any]]) -> Placed:
        """`values` by graph input, in memory; onnxruntime-genai takes them from a file alone, which goes again."""
        key = str(next(self._keys))
        try:
            with tempfile.TemporaryDirectory(prefix="loratrf-") as folder:
                file = Path(folder) / f"{key}{SUFFIX}"
                write_values(file, values)
                self._adapters.load(str(file), key)
        except OSError as error:
            raise UserError(
                "onnxruntime-genai takes adapters from files alone, and none can be written to "
                f"{tempfile.gettempdir()}: {error.strerror or error}. Free some space there, or name another folder in "
                "TMPDIR."
            ) from error
        placed = Placed(self._adapters, key)
        weakref.finalize(placed, self._adapters.unload, key).atexit = False
        return placed
