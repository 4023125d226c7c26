"""Other trainers' settings into ours. Weights are converted in model/."""
