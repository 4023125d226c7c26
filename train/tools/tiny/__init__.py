"""The drawn world and the tiny SDXL that the recipe runs on without downloads."""
