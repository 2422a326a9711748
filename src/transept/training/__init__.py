"""Learning: one loop, its objectives, its state."""
