"""Our arithmetic held against the original trainer's own code, in its own Python. Nothing of it is copied or shipped."""
