"""Pictures larger than they are, to any size: which passes of a model lead there, and what a run does and tells."""
