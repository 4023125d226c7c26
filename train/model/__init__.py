"""SDXL: its file layouts, where a stage starts from, its networks, text, memory. How it is trained stands in optim/ and engine/."""
