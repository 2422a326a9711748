"""Floor 2: the shared blocks, as nn.Modules. A variety is one class put into a slot, never a flag."""
