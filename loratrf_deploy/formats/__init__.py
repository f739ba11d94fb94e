"""The files that are written and read back: manifest, .onnx_adapter, and what a model takes at run time."""
