"""Models: what differs between decoder families as data, and the blocks that interpret it."""
