"""Floor 7: thin commands over the library."""
