"""The float types of weights, by the names that numpy, torch and this package give them alike."""

from __future__ import annotations

from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

__all__ = ["DTYPES", "NUMPY", "RUN_TIME_DTYPES", "DType"]

DType = Literal["float32", "float16", "bfloat16"]
"""torch's type of a name is getattr(torch, name), onnx_ir's ir.DataType.from_numpy(np.dtype(NUMPY[name]))."""
DTYPES: tuple[DType, ...] = get_args(DType)
NUMPY: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
RUN_TIME_DTYPES: dict[int, DType] = {1: "float32", 10: "float16"}
"""What ONNX Runtime's Python feeds and .onnx_adapter files hold, by ONNX's number of the type."""
