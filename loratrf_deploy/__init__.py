"""LoRA and LoRATRF adapters in production on ONNX Runtime.

Running a model needs onnxruntime alone: `create_session("model.onnx")`, or `AdapterSession("model.onnx")` where its
adapters swap at run time. Making one is `loratrf_deploy.export`, training an adapter `loratrf_deploy.peft`; both need
the `export` extra and are imported only when asked for.
"""

from .adapters.adapter import Adapter, LayerAdapter, read_adapter
from .errors import UserError
from .runtime.adapter_session import AdapterInfo, AdapterSession
from .runtime.session import create_session, library_path
from .version import __version__

__all__ = [
    "Adapter",
    "AdapterInfo",
    "AdapterSession",
    "LayerAdapter",
    "UserError",
    "__version__",
    "create_session",
    "library_path",
    "read_adapter",
]
