"""Floor 5: from logits to answers."""
