"""LayerNorm and its kin: y = scale * normalized + bias.

val_total_scale[f] = sum over V rows and positions of cotangents * normalized        [F]
val_total_bias[f]  = sum over V rows and positions of cotangents                     [F]
dots_scale[b] = einsum("bf,f->b", sum over positions of (cotangents * normalized), val_total_scale)
dots_bias[b]  = einsum("bf,f->b", sum over positions of cotangents,                val_total_bias)

An interceptor marks the calls of Flax's norms in the jaxpr and adds their normalized activations;
the engine's walk finds the marks, under ``nn.scan`` and ``nn.remat`` too, and calls
``layernorm_dot_products`` with the output cotangents.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from ghostjax._checks import check_val_batch_size
from ghostjax._dtypes import wide_dtype
from ghostjax.core import Rows, infer

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)


@functools.partial(jax.jit, static_argnames="val_batch_size")
def layernorm_dot_products(
    normalized: jax.Array, cotangents: jax.Array, val_batch_size: int
) -> dict[str, jax.Array]:
    """Per-row inner products of LayerNorm's scale and bias gradients with the validation rows'.

    With g_r[scale] = sum_t cotangents[r, t, :] * normalized[r, t, :] and
    g_r[bias] = sum_t cotangents[r, t, :], the result is ``dots[b] = <g_b, sum_v g_v>`` for each.

    Args:
      normalized: [N, ..., F], (x - mean) / sqrt(var + epsilon), before scale and bias. The axes
        between the first and the last are positions; there may be none.
      cotangents: gradient of the loss at the layer's output, the same shape.
      val_batch_size: V, static. The last V rows are the validation rows, the first B = N - V the
        training rows.

    Returns:
      ``{"scale": [B], "bias": [B]}``. Inputs are cast to float32 first, sums and products are in
      float32 (all in float64 for float64 inputs). The scale is that of the cotangents: a sum over
      validation rows, not a mean, unless the cotangents carry 1/V.

    Raises:
      ValueError: shapes differ, there is no feature axis, or not 0 < V < N.

    >>> import jax.numpy as jnp
    >>> normalized = jnp.array([[1.0, -1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> cotangents = jnp.array([[1.0, 1.0], [0.5, 2.0], [1.0, -1.0]])
    >>> dots = layernorm_dot_products(normalized, cotangents, val_batch_size=1)
    >>> dots["scale"], dots["bias"]
    (Array([3., 0.], dtype=float32), Array([ 0. , -1.5], dtype=float32))

    Source: Layer Normalization, arXiv:1607.06450; inner products of factors as in Data Shapley in
    One Training Run, arXiv:2406.11011, section 4.2.
    """
    if normalized.shape != cotangents.shape or normalized.ndim < 2:
        raise ValueError(
            "normalized and cotangents must have one shape [N, ..., F] of rank 2 or more. Found "
            f"{normalized.shape} and {cotangents.shape}."
        )
    num_train = normalized.shape[0] - check_val_batch_size(val_batch_size, normalized.shape[0])

    def dots(rows):
        total = jnp.sum(rows[num_train:], axis=0)
        return jnp.einsum("bf,f->b", rows[:num_train], total, precision="highest")

    found = {name: dots(rows) for name, rows in _row_gradients(normalized, cotangents).items()}
    chex.assert_shape(list(found.values()), (num_train,))
    return found


def _row_gradients(normalized, cotangents) -> dict[str, jax.Array]:
    """[N, F]: the gradient of every row, summed over positions, in float32 or wider."""
    dtype = wide_dtype(normalized, cotangents)
    normalized, cotangents = normalized.astype(dtype), cotangents.astype(dtype)
    positions = tuple(range(1, normalized.ndim - 1))
    return {
        "scale": jnp.sum(cotangents * normalized, axis=positions),
        "bias": jnp.sum(cotangents, axis=positions),
    }


@contextlib.contextmanager
def capturing_norms() -> Iterator[None]:
    """Within it, calls of Flax's norms are marked in the jaxpr, for ``NormMeeting`` to be found."""
    inside: list[list[Any]] = []  # for every mark that is being made, its calls: (inputs, outputs)

    def intercept(next_fun, args, kwargs, context):
        if not inside:
            return _marked(inside, next_fun, args, kwargs, context)
        outputs = next_fun(*args, **kwargs)
        inside[-1].append(([*args, *kwargs.values()], outputs))
        return outputs

    with nn.intercept_methods(intercept):
        yield


def _marked(inside, next_fun, args, kwargs, context):
    """The outputs of a call; that of a norm is a jitted function's with a name of its own."""
    module, inputs = context.module, [*args, *kwargs.values()]
    # With an interceptor of the user's in between, the call is more than the module's own.
    is_plain = next_fun is context.orig_method and context.method_name == "__call__"
    params = module.variables.get("params", {}) if is_plain and _is_known(module, inputs) else {}
    if not params:
        return next_fun(*args, **kwargs)
    again = module.clone(parent=None, name=None)
    fields = {field.name for field in dataclasses.fields(module)}
    off = {name: False for name in ("use_scale", "use_bias") if name in fields}
    wide = wide_dtype(inputs[0])
    bare = again.clone(dtype=wide, **off)
    unchanged = []

    def applied(module, variables, x):
        calls = []
        inside.append(calls)
        try:
            outputs = module.apply(variables, x)
        finally:
            inside.pop()
        inputs, own = calls[-1] if calls else ([], None)
        unchanged.append(len(inputs) == 1 and inputs[0] is x and outputs is own)
        return outputs

    def call(x, params):
        return applied(again, {"params": params}, x), applied(bare, {}, x.astype(wide))

    call.__name__ = "_".join([_PREFIX + type(module).__name__, *sorted(params)])
    outputs, _ = jax.jit(call)(inputs[0], params)
    # An interceptor around the engine would have changed inputs or outputs twice.
    return outputs if all(unchanged) else next_fun(*args, **kwargs)


def _is_known(module: Any, inputs: list[Any]) -> bool:
    return (
        type(module) in NORMS
        and len(inputs) == 1
        and not module.is_initializing()
        and getattr(module, "feature_axes", -1) in (-1, (-1,))
        and getattr(module, "axis_name", None) is None
        and jnp.issubdtype(jnp.result_type(inputs[0]), jnp.floating)
    )


_PREFIX = "ghostjax_"


class NormMeeting:
    """Scale and bias meet the normalized activations [N, ..., F], rows in front."""

    def __init__(
        self, eqn, function, operands, outputs, rows, num_rows: int, names, num_train: int
    ):
        del function, rows, names
        self.eqn, self.num_rows, self.num_train = eqn, num_rows, num_train
        self.names = dict(zip(_places(eqn), _parameters(eqn)))
        self.moving: dict[int, tuple[int, ...]] = {}
        for position, value in enumerate(operands):
            for path in value.tangents:
                self.moving[path] = (*self.moving.get(path, ()), position)
        self.outputs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in eqn.outvars]
        self.dtypes = {position: operands[position].primal.dtype for position in self.names}
        self.differentiable = [0]  # the normalized activations are there to be captured
        self.needs_data = True
        self.in_rows: dict[int, bool] = {}
        self.train, self.val = slice(None, num_train), slice(num_train, None)

    @staticmethod
    def fits(eqn: Any, operands: Any, rows: Any) -> bool:
        """Whether rows lie in front, and the features, which are a parameter's only axis, last."""
        places, shape = _places(eqn), eqn.outvars[0].aval.shape
        return (
            list(rows) == [Rows(0), Rows(0)]
            and len(shape) >= 2
            and all(
                not operands[k].is_data
                and len(operands[k].tangents) == 1
                and eqn.invars[k].aval.shape == shape[-1:]
                and _axis_of(eqn, k) == Rows(len(shape) - 1)
                for k in places
            )
        )

    def keep(self, operands, outputs) -> Any:
        del operands
        return outputs[1]

    def gradient(self, part, normalized, cotangents) -> dict[int, Any]:
        rows = _row_gradients(normalized[part], cotangents[0][part])
        return {
            position: jnp.sum(rows[name], axis=0).astype(self.dtypes[position])
            for position, name in self.names.items()
        }

    def by_parameter(self, gradients) -> dict[int, list[Any]]:
        return {path: [gradients[k] for k in own] for path, own in self.moving.items()}

    def dots(self, normalized, cotangents, vectors) -> dict[int, Any]:
        rows = _row_gradients(normalized[self.train], cotangents[0][self.train])

        def of(position, vector):
            own = rows[self.names[position]]
            return jnp.einsum("bf,f->b", own, vector.astype(own.dtype), precision="highest")

        found = {path: sum(map(of, own, vectors[path])) for path, own in self.moving.items()}
        chex.assert_shape(list(found.values()), (self.num_train,))
        return found

    def at_once(self, normalized, cotangents) -> tuple[dict[int, Any], dict[int, Any]]:
        found = layernorm_dot_products(
            normalized, cotangents[0], val_batch_size=self.num_rows - self.num_train
        )
        dots = {path: found[self.names[place]] for path, (place,) in self.moving.items()}
        return dots, self.gradient(self.train, normalized, cotangents)


def _places(eqn: Any) -> list[int]:
    """The positions of the parameters among the operands: the last ones."""
    return list(range(len(eqn.invars) - len(_parameters(eqn)), len(eqn.invars)))


def _axis_of(eqn: Any, place: int) -> Any:
    """Where the axis of a parameter is in the output: vectorization may have put another last."""
    axes = [Rows(0) if k == place else None for k in range(len(eqn.invars))]
    return infer(eqn.params["jaxpr"], axes, eqn.invars[place].aval.shape[0])[0]


def _parameters(eqn: Any) -> list[str]:
    """The names of the parameters, which the mark's name ends with."""
    return eqn.params["name"].removeprefix(_PREFIX).split("_")[1:]


NORM_MEETINGS = {
    f"{_PREFIX}{norm.__name__}_{names}": NormMeeting
    for norm in NORMS
    for names in ("bias", "scale", "bias_scale")
}
