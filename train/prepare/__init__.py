"""The way from raw images and their metadata to a training set; one file a step."""
