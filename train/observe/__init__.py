"""Looking at a run: metrics, held-out loss, sample pictures, what a run left. Nothing here changes a weight."""
