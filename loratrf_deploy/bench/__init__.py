"""What an exported model costs on this machine. Needs neither torch nor onnx."""
