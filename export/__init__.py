"""From trained adapters to a proven ONNX model: `export_adapter` and `export_grouped`, behind loratrf-export."""

from .grouped import export_grouped
from .onto import convert_adapter, convert_adapters
from .options import ExportOptions
from .proven import ExportResult, ParityFailed
from .single import export_adapter

__all__ = [
    "ExportOptions",
    "ExportResult",
    "ParityFailed",
    "convert_adapter",
    "convert_adapters",
    "export_adapter",
    "export_grouped",
]
