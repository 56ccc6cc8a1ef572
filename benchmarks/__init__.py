"""How fast gptcore is, against PyTorch and against this machine: `make bench`, or `python -m benchmarks --help`."""
