"""Adapters (LoRA and its relatives): their names and files, what they add to a model, merging and extraction. Training one stands in engine/."""
