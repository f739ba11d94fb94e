"""Running a model: ONNX Runtime alone, neither torch nor onnx."""
