"""From a path to an opened data set: what `--data_path` may be."""
