"""Killing tiny runs at random moments, and the processes that it takes."""
