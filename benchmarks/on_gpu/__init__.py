"""What python -m benchmarks.gpu measures, by part."""
