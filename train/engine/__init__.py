"""A stage from its refusals to the hand-off: setup, restore, session, trial, loop, step, and how it ends. The order of the phases stands in run.py."""
