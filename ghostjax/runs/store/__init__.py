"""The run directory: how it is written, so that nothing is lost, and read."""
