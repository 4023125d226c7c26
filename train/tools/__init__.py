"""What only the scripts need: the tiny world, benchmarks, chaos, pages. Nothing in train/ imports it."""
