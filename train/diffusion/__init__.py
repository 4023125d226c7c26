"""Noise and its offset, the forward and its loss, samplers. Batches are made in data/."""
