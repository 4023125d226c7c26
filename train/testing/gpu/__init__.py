"""Benchmark B: the full-size training step on a card, in two calls that lose nothing when they are cut."""
