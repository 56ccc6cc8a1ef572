"""The operations' kernels in Triton, for NVIDIA and AMD GPUs, and in Triton's interpreter for CPU tensors.

Each file holds kernels, then `forward` and `backward` with the arguments of the operator in `gptcore.ops`, which has
checked them.
"""
