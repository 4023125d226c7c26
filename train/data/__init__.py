"""The prepared set as training reads it: index, shards, selection, dataset, loader. It is made in prepare/."""
