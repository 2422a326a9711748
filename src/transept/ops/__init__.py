"""Floor 1: pure functions; where there is a fast path, a readable reference stands beside it under the same signature."""
