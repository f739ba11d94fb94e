"""From trained adapters to a proven ONNX model: `export_adapter` and `export_grouped`, behind loratrf-export."""

from .grouped import export_grouped
from .proven import ExportResult
from .single import export_adapter

__all__ = ["ExportResult", "export_adapter", "export_grouped"]
