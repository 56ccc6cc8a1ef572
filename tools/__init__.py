"""Programs that only maintainers run: the mutants of the CUDA kernels, and the tables of what they compile to."""
