"""From trained adapters to a proven ONNX model: `export_adapter` and `export_grouped`, behind loratrf-export."""

from .exporter import ExportResult, export_adapter
from .grouped import export_grouped

__all__ = ["ExportResult", "export_adapter", "export_grouped"]
