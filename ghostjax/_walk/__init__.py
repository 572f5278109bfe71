"""Per-row numbers of any loss, by a walk over its jaxpr."""
