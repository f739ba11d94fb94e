"""What is known of ONNX Runtime GenAI: its folders, its generation loop, its builder's names."""
