"""Benchmarks of speed and memory. `python -m benchmarks NAME [options]` runs `benchmarks/NAME.py`."""
