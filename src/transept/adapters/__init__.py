"""Floor 4: transforms of a finished model."""
