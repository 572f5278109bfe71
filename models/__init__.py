"""Models that tests and benchmarks share. No part of the package."""
