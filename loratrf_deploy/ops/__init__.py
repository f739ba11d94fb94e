"""What the operators are: their table, their meaning in numpy, the kernels as PyTorch operators."""
