"""The loop over steps, the jitted step, and the scores of its rows."""
