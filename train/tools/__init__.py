"""Behind scripts/ and `anix`: what a command does beyond training and preparing."""
