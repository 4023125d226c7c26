"""Pixels to latents and shards, and the index over them. How shards are read stands in data/."""
