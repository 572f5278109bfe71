"""The log of a training loop of one's own."""
