"""The dry run of a stage: updates, memory, disk, time, cost."""
