"""Error classes. Each is also the built-in error a caller would expect.

Every message says where, what was expected, what was found and what to do.
"""


class BatchError(ValueError):
    """The rows of a batch do not fit together, or do not fit ``val_batch_size``."""


class ParameterError(TypeError):
    """A leaf of the parameters cannot be differentiated."""


class RowAxisError(ValueError):
    """It cannot be known which axis of a value indexes the rows, or rows are mixed."""


ELSEWHERE = (
    "Or use ghostjax.value_grad_and_dots, which takes any JAX function, with the gradient of the "
    "validation rows as direction."
)


class EngineError(ValueError):
    """The limit is the engine's own; what no method can do is a ``RowAxisError`` or the like."""

    def __str__(self) -> str:
        return f"{super().__str__()} {ELSEWHERE}"


class UnsupportedModuleError(EngineError):
    """A module does something the engine cannot take apart exactly."""


class UncoveredParameterError(EngineError):
    """Parameters are used where their per-row gradients cannot be captured."""
