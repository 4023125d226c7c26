"""Animagine XL 3.1's three-stage SDXL recipe. A file is a concept; `run.py` reads as the recipe."""
