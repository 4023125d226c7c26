"""Judging samples with the user's models."""
