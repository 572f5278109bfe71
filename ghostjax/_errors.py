"""Error classes. Each is also the built-in error a caller would expect.

Every message says where, what was expected, what was found and what to do.
"""


class BatchError(ValueError):
    """The rows of a batch do not fit together, or do not fit ``val_batch_size``."""


class ParameterError(TypeError):
    """A leaf of the parameters cannot be differentiated."""


class RowAxisError(ValueError):
    """It cannot be known which axis of a value indexes the rows, or rows are mixed."""
