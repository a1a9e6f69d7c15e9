"""Metrics of the project; each folder is an `evaluate` module of its own."""
