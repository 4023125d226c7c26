"""Raw images to training set: one file a step, in the order of `ls`. Nothing of the engine is imported here."""
