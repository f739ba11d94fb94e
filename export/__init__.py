"""From a trained adapter to a proven ONNX model: `export_adapter`, the library behind loratrf-export."""

from .exporter import ExportResult, export_adapter

__all__ = ["ExportResult", "export_adapter"]
