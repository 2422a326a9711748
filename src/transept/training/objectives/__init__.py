"""What is made small in training: one file per family of losses. Each holds its loss and, where it has one, what prepares its samples."""
