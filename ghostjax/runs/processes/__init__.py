"""Several processes that make one run together, one a host, as ``jax.distributed`` has them.

All of them make every step; the first writes what belongs to the whole run. None goes on without
the others: every process is connected to the first one, and a connection that ends without a
farewell ends the process with one line, wherever its main thread is.
"""
