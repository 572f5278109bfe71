"""How runs are shown, as pages and in the terminal."""
