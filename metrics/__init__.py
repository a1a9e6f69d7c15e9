"""Metrics of the project; each folder is a separate `evaluate` module."""
