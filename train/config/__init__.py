"""Every key of a stage, a dataset and a prompts file. What a key does stands where it is read, not here."""
