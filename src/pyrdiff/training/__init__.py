"""Training: settings, the loop, losses, checkpoints. Knows a method by its description only, never by name."""
