"""What lies on disk: run directory, checkpoints, resume, tensors. Networks are made in model/."""
