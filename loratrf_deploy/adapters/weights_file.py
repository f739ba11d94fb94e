"""An adapter's files: found, decoded and refused. Nothing here knows what the tensors mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from ..errors import UserError, some
from ..files import readable

__all__ = ["CONFIG_FILE", "check_finite", "decode", "find_weights"]

CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_FLOATS: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_MOST_DIMENSIONS = 8  # numpy ends at 64
_INTEGERS: dict[str, Any] = {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_}


def find_weights(path: Path) -> Path:
    """The weights file of the adapter folder `path`, or a UserError that says what to do instead."""
    with readable(path):
        return _find(path)


def _find(path: Path) -> Path:
    if path.is_file():
        raise UserError(f"{path} is a file, expected the adapter's folder. Pass {path.parent}.")
    if not path.is_dir():
        raise UserError(
            f"No folder at {path}: expected an adapter folder as PEFT's save_pretrained writes it. Names on a hub are "
            "not downloaded; fetch the adapter first, for example with `hf download NAME --local-dir FOLDER`."
        )
    if not (path / CONFIG_FILE).is_file():
        inner = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG_FILE}"))
        hint = f"Did you mean {some(inner, ' or ')}?" if inner else "Save the adapter with PEFT's save_pretrained."
        raise UserError(f"{path} has no {CONFIG_FILE}, so it is not an adapter folder. {hint}")
    weights = path / _WEIGHTS_FILE
    if weights.is_file():
        return weights
    if (path / _PICKLE_FILE).is_file():
        raise UserError(
            f"{path / _PICKLE_FILE} is a pickle file, which can run code when it is opened, so it is refused. Convert "
            f'it once, in that folder: python -c "import torch, safetensors.torch as s; t = '
            f"torch.load('{_PICKLE_FILE}', map_location='cpu', weights_only=True); s.save_file({{k: "
            f"v.clone().contiguous() for k, v in t.items()}}, '{_WEIGHTS_FILE}')\""
        )
    raise UserError(f"{path} has no {_WEIGHTS_FILE}. The folder is incomplete: fetch or save the adapter again.")


def decode(file: Path, raw: bytes) -> tuple[dict[str, NDArray], set[str]]:
    """Tensors of a safetensors file, floats widened to float32, and the names of the float types it stores."""
    try:
        # The safetensors core holds the header against the file: ranges, overlaps, sizes.
        entries = safetensors.deserialize(raw)
    except Exception as error:  # SafetensorError derives from Exception directly
        raise UserError(
            f"{file} is not a valid safetensors file ({error}): truncated, or not what its name says. Fetch or save "
            "the adapter again."
        ) from error
    tensors: dict[str, NDArray] = {}
    dtypes: set[str] = set()
    for name, entry in entries:
        dtype = _FLOATS.get(entry["dtype"]) or _INTEGERS.get(entry["dtype"])
        is_float = entry["dtype"] in _FLOATS
        adapter_part = ".lora_" in name or ".trf_" in name
        if dtype is None or (adapter_part and not is_float):
            raise UserError(
                f"{file}: {name} is stored as {entry['dtype']}, expected float32, float16 or bfloat16. Save the "
                "adapter again in one of these types."
            )
        if len(entry["shape"]) > _MOST_DIMENSIONS:
            raise UserError(
                f"{file}: {name} has {len(entry['shape'])} dimensions, expected at most {_MOST_DIMENSIONS}. Fetch or "
                "save the adapter again."
            )
        value = np.frombuffer(entry["data"], dtype=dtype).reshape(entry["shape"])
        if is_float:
            dtypes.add(np.dtype(dtype).name)
            with np.errstate(over="ignore"):  # becomes infinite, which is reported by name
                value = value.astype(np.float32)
        tensors[name] = value
    return tensors, dtypes


def check_finite(file: Path, tensors: Mapping[str, NDArray]) -> None:
    broken = [name for name, value in tensors.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{file} holds NaN or infinite values (or values beyond float32) in {some(broken)}. Training diverged or "
            "the file is damaged: take an earlier checkpoint or train again with a lower learning rate."
        )
