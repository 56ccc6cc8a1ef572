"""Triton kernels of the operations, for NVIDIA and AMD GPUs, and for CPU tensors in Triton's interpreter.

Each file has kernels, then `forward` and `backward` with the arguments of the operator in `gptcore.ops`, which has
checked them.
"""
