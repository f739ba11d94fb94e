"""The base model, and PEFT's own model, in PyTorch."""
