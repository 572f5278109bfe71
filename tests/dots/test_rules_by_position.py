"""Derivative rules with parameters, where examples are told apart along two axes, or rows of
cotangents are written at the places of labels."""

import jax
import jax.numpy as jnp
import pytest

from ghostjax import squared_norms, testing, value_and_dots_fn, value_grad_and_dots
from models.arrays import direction_like, draw
from tests.dots.checks import expected_dots

B, T, F = 3, 4, 5
PARAMS = {"w": draw(F, F), "s": draw(F, seed=4)}
X = draw(B, T, F, seed=1)
PLACES = jnp.arange(B * T).reshape(B, T)


@jax.custom_vjp
def product(x, w):
    return x @ w


def _product_backward(kept, g):
    x, w = kept
    return g @ w.T, x.reshape(-1, F).T @ g.reshape(-1, F)


product.defvjp(lambda x, w: (x @ w, (x, w)), _product_backward)


@jax.custom_vjp
def clipped_scale(x, s):
    return x * s[None, None]


clipped_scale.defvjp(
    lambda x, s: (clipped_scale(x, s), (x, s)),
    lambda kept, g: (
        g * kept[1][None, None],
        jnp.sum(jnp.clip(g, -0.2, 0.2) * kept[0], axis=(0, 1)),
    ),
)


@jax.custom_vjp
def scale_in_two_steps(x, s):
    return x * jnp.expand_dims(s, range(x.ndim - 1))


def _two_steps_backward(kept, g):
    x, s = kept
    summed = g * x
    while summed.ndim > 1:
        summed = jnp.sum(summed, axis=0)
    return g * jnp.expand_dims(s, range(x.ndim - 1)), summed


scale_in_two_steps.defvjp(lambda x, s: (scale_in_two_steps(x, s), (x, s)), _two_steps_backward)


def loss_fn(params, x):
    return jnp.sum(jnp.square(jnp.sin(clipped_scale(product(x, params["w"]), params["s"]))))


def expected(direction):
    """By place, what the rules give for its cotangents."""
    h = X @ PARAMS["w"]
    _, back = jax.vjp(lambda y: jnp.sum(jnp.square(jnp.sin(y))), h * PARAMS["s"][None, None])
    (g,) = back(1.0)
    return {
        "w": jnp.einsum("bti,bto,io->bt", X, g * PARAMS["s"][None, None], direction["w"]).ravel(),
        "s": jnp.einsum("bto,o->bt", jnp.clip(g, -0.2, 0.2) * h, direction["s"]).ravel(),
    }


@pytest.mark.quick("sorted_by_data")
@pytest.mark.parametrize("arrangement", ["in_place", "positions_first", "sorted_by_data"])
def test_rules_by_position(arrangement):
    def arranged(params, x):
        if arrangement == "positions_first":
            x = x.swapaxes(0, 1)
        elif arrangement == "sorted_by_data":
            x = x[jnp.argsort(x[:, 0, 0])]
        return loss_fn(params, x)

    direction = direction_like(PARAMS)
    labels = {"labels": PLACES, "num_labels": B * T}

    @jax.jit
    def run(params, x, v):
        early = value_grad_and_dots(arranged, loss_reduction="sum")
        late = value_and_dots_fn(arranged, loss_reduction="sum")
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v)
        several = late(params, x, **labels)[2].result(stacked)
        return early(params, x, direction=v, **labels), several

    result, several = run(PARAMS, X, direction)
    wanted = expected(direction)
    testing.assert_dots_close(result.dots, wanted)
    doubled = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), wanted)
    testing.assert_dots_close(several.dots, doubled)
    assert (int(result.conflicts), int(several.conflicts)) == (0, 0)


@pytest.mark.parametrize("shape", [(B, T, F), (B * T, F)])
def test_rules_that_sum_step_by_step(shape):
    def stepwise(params, x):
        return jnp.sum(jnp.square(jnp.sin(scale_in_two_steps(x.reshape(shape), params["s"]))))

    params = {"s": PARAMS["s"]}
    direction = direction_like(params)
    fn = value_grad_and_dots(stepwise, loss_reduction="sum")
    result = jax.jit(lambda p, x: fn(p, x, direction=direction, labels=PLACES, num_labels=B * T))(
        params, X
    )
    slopes = jnp.sin(2 * X * params["s"][None, None]) * X
    testing.assert_dots_close(
        result.dots["s"], jnp.einsum("bto,o->bt", slopes, direction["s"]).ravel()
    )


V = 6
HEAD = {"w": PARAMS["w"], "head": draw(F, V, seed=7)}
BATCH = {"x": X, "y": jnp.arange(B * T).reshape(B, T) * 5 % V}
ROWS, POSITIONS = jnp.arange(B)[:, None], jnp.arange(T)[None]


def losses_of(h, head, y):
    logits = h @ head
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, y[..., None], -1)[..., 0]


def place_losses(params, batch):
    return losses_of(jnp.tanh(batch["x"] @ params["w"]), params["head"], batch["y"])


def added(d, y, c, rows=ROWS):
    return (d * c[..., None]).at[rows, POSITIONS, y].add(-c)


def with_rule(written, per_row=True):
    """Cross-entropy and head in one, with one loss per row or position."""

    @jax.custom_vjp
    def fused(h, head, y):
        losses = losses_of(h, head, y)
        return jnp.sum(losses, 1) if per_row else losses

    def backward(kept, c):
        h, head, y = kept
        d = written(jax.nn.softmax(h @ head), y, c[:, None] if per_row else c)
        return d @ head.T, jnp.einsum("btf,btv->fv", h, d), None

    fused.defvjp(lambda *args: (fused(*args), args), backward)

    def loss_fn(params, batch):
        h = jnp.tanh(batch["x"] @ params["w"])
        return jnp.sum(jnp.sin(fused(h, params["head"], batch["y"])))

    def losses(params, batch):
        own = place_losses(params, batch)
        return jnp.sin(jnp.sum(own, 1)) if per_row else jnp.sum(jnp.sin(own), 1)

    return loss_fn, losses


def flattened(d, y, c):
    d = (d * c[..., None]).reshape(B * T, V)
    return d.at[jnp.arange(B * T), y.ravel()].add(-c.ravel()).reshape(B, T, V)


WRITTEN = {
    "added": (added, True),
    "added by position": (added, False),
    "set": (
        lambda d, y, c: (
            d * c[..., None] + jnp.zeros_like(d).at[ROWS, POSITIONS, y].set(jnp.tile(-c, (1, T)))
        ),
        True,
    ),
    "flattened": (flattened, False),
}


@pytest.mark.quick("added", "added by position")
@pytest.mark.parametrize("name", WRITTEN)
def test_rows_of_cotangents_at_the_places_of_labels(name):
    loss_fn, losses = with_rule(*WRITTEN[name])
    direction = direction_like(HEAD)
    ids = jnp.array([[0, 0, 2, 2], [2, 1, -1, 1], [1, 1, 1, 0]])

    @jax.jit
    def run(params, batch):
        fn = value_grad_and_dots(loss_fn, loss_reduction="sum")
        late = value_and_dots_fn(loss_fn, loss_reduction="sum")
        labels = {"labels": ids, "num_labels": 3}
        early = fn(params, batch, direction=direction)
        by_label = fn(params, batch, direction=direction, **labels)
        norms = squared_norms(lambda *args: loss_fn(*args) / B)(params, batch)
        return early, late(params, batch)[2](direction), by_label, norms

    result, late, by_label, norms = run(HEAD, BATCH)
    wanted = expected_dots(losses, HEAD, BATCH, direction)
    testing.assert_dots_close(result.dots, wanted)
    testing.assert_dots_close(late, wanted)
    grads = testing.per_example_grads(losses, HEAD, BATCH)
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g), (1, 2)), grads)
    testing.assert_dots_close(norms, squares)
    assert int(result.conflicts) == int(by_label.conflicts) == 0

    def of_label(params, batch, label):
        """With all that other labels use of the parameters held fixed."""
        own = ids == label
        fixed = jax.lax.stop_gradient(params)
        every = [place_losses(p, batch) for p in (params, fixed)]
        place = jnp.where(own, *every)
        return jnp.sum(jnp.sin(jnp.sum(place, 1) if WRITTEN[name][1] else place))

    found = [jax.grad(of_label)(HEAD, BATCH, label) for label in range(3)]
    testing.assert_dots_close(
        by_label.dots,
        {key: jnp.array([jnp.vdot(g[key], direction[key]) for g in found]) for key in HEAD},
    )


def test_rows_of_cotangents_at_places_of_other_rows():
    loss_fn, _ = with_rule(lambda d, y, c: added(d, y, c, (ROWS + 1) % B))
    result = jax.jit(value_grad_and_dots(loss_fn))(HEAD, BATCH, direction=HEAD)
    assert int(result.conflicts) > 0
    assert bool(jnp.isnan(result.total()).all())


def test_rows_of_cotangents_that_are_normalised_together():
    loss_fn, _ = with_rule(lambda d, y, c: added(d, y, c / jnp.sum(c)))
    with pytest.raises(ValueError, match="combines rows with a value in which rows are mixed"):
        jax.eval_shape(value_grad_and_dots(loss_fn), HEAD, BATCH, direction=HEAD)
