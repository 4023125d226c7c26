"""A stage from its refusals to the hand-off: setup, trial, session, step, loop, processes. The order of the phases stands in run.py."""
