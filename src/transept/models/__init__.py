"""Floor 3: one page per family, in text/, vision/, audio/ and multimodal/."""
