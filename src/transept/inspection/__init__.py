"""Floor 5: a model opened to see what it costs and why it answered."""
