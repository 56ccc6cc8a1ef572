"""Benchmarks of gptcore against PyTorch and the machine's limits: `make bench`, or `python -m benchmarks --help`."""
