"""LoRA and LoRATRF adapters in production on ONNX Runtime.

Running a model needs onnxruntime alone: `create_session("model.onnx")`, or `AdapterSession("model.onnx")` where its
adapters swap at run time; `GenerationSession(folder)` generates text with onnxruntime-genai, `StagedSession(folder)`
with onnxruntime alone what was exported in stages. Making and proving one (`export_adapter`, `check_parity`) needs the
`export` extra, as does training an adapter (`loratrf_deploy.peft`); these are imported only when asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .adapters.adapter import Adapter, LayerAdapter, read_adapter
from .errors import UserError
from .runtime.adapter_session import AdapterSession, Answer
from .runtime.generation_session import GenerationSession
from .runtime.residents import AdapterInfo
from .runtime.session import create_session, library_path
from .runtime.staged_session import StagedSession
from .version import __version__

if TYPE_CHECKING:
    from .export import ExportOptions, export_adapter
    from .parity import check_parity

__all__ = [
    "Adapter",
    "AdapterInfo",
    "AdapterSession",
    "Answer",
    "ExportOptions",
    "GenerationSession",
    "LayerAdapter",
    "StagedSession",
    "UserError",
    "__version__",
    "check_parity",
    "create_session",
    "export_adapter",
    "library_path",
    "read_adapter",
]

_ON_DEMAND = {"ExportOptions": ".export", "export_adapter": ".export", "check_parity": ".parity"}


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        return getattr(importlib.import_module(_ON_DEMAND[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
