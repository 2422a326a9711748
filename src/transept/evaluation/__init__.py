"""Floor 6: how good a model is, and whether it is the one its publisher made."""
