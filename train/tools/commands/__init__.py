"""The command lines: each room parses, calls and prints, and is both scripts/NAME.py and `anix NAME`; work is done elsewhere."""
