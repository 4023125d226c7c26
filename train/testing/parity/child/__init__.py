"""What runs in the original trainer's Python: its own functions called on what they are given. Imports nothing of ours but the loader."""
