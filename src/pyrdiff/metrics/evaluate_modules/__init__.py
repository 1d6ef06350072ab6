"""The metrics as modules of Hugging Face evaluate: `evaluate.load(path_of_a_file)`, or `pyrdiff.metrics.load`."""
