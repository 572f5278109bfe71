"""What the log of a run means, in numbers."""
