"""Behind scripts/: what a command does beyond training and preparing."""
