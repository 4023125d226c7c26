"""Looking inside captions, buckets, sets, models, checkpoints, runs."""
