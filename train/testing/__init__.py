"""Benchmarks and chaos. Stands above everything, is not installed, and nothing imports it."""
