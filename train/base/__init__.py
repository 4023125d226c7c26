"""What stands under everything: errors, files, console, secrets, signals, faults. Standard library only; nothing of ours is imported here."""
