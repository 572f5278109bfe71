"""The step that chooses its rows: against plain steps, and scores against per-row autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ghostjax import selection
from ghostjax.selection import at_random, by_loss, by_norm, by_score, select_step

N, K, V, T, F = 6, 3, 2, 4, 5
EXCLUDE = ("embed", "blocks/1/*")


def init(seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    return {
        "embed": jax.random.normal(keys[0], (7, F)),
        "blocks": [
            {"kernel": jax.random.normal(key, (F, F)) / 2, "bias": jnp.zeros((1, 1, F))}
            for key in keys[1:3]
        ],
    }


def loss_fn(params, batch):
    """A tied head: the table is used twice."""
    h = params["embed"][batch["tokens"]]
    for block in params["blocks"]:
        h = jnp.tanh(h @ block["kernel"] + block["bias"])
    logits = h @ params["embed"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean(1)


def draw(seed, rows):
    tokens = jax.random.randint(jax.random.key(seed), (rows, T + 1), 0, 7)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def taken(batch, rows):
    return jax.tree.map(lambda leaf: leaf[rows], batch)


def mean_loss(params, batch):
    return loss_fn(params, batch).mean()


@jax.jit
def per_row_grads(params, batch):
    def of_row(params, row):
        return loss_fn(params, jax.tree.map(lambda leaf: leaf[None], row))[0]

    return jax.vmap(jax.grad(of_row), (None, 0))(params, batch)


def zeroed(tree):
    """A tree of the parameters with zeros where ``EXCLUDE`` leaves out."""
    first, second = tree["blocks"]
    zeros = jax.tree.map(jnp.zeros_like, {"embed": tree["embed"], "second": second})
    return {"embed": zeros["embed"], "blocks": [first, zeros["second"]]}


def dots(tree, direction):
    return sum(
        jnp.sum((leaf * vector[None]).reshape(N, -1), axis=1)
        for leaf, vector in zip(jax.tree.leaves(tree), jax.tree.leaves(direction), strict=True)
    )


def assert_close(found, expected):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


OPTIMIZERS = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "adafactor": optax.adafactor(1e-2),
    "schedule": optax.adam(optax.linear_schedule(1e-2, 0.0, 5)),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
    "lion": optax.lion(1e-3),
    "lbfgs": optax.lbfgs(),
}
WITHOUT_DERIVATIVE = ("lion", "lbfgs")
SLOW = ("adamw", "schedule", "lbfgs")


def plain_step(optimizer, params, state, batch):
    """With the mean loss of a batch."""
    value, grads = jax.value_and_grad(mean_loss)(params, batch)
    updates, state = optax.with_extra_args_support(optimizer).update(
        grads,
        state,
        params,
        value=value,
        grad=grads,
        value_fn=lambda params: mean_loss(params, batch),
    )
    return value, optax.apply_updates(params, updates), state


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OPTIMIZERS],
)
def test_parameters_are_those_of_training_on_the_chosen_rows_alone(name, standard_promotion):
    optimizer, through = OPTIMIZERS[name], name not in WITHOUT_DERIVATIVE
    step = select_step(loss_fn, optimizer, K, through_optimizer=through)
    plain = jax.jit(lambda *args: plain_step(optimizer, *args))
    params, val = init(), draw(1, V)
    state, other = optimizer.init(params), (params, optimizer.init(params))
    for number in range(3):
        batch = draw(10 + number, N)
        params, state, selected = step(params, state, batch, val)
        rows = np.asarray(selected.rows)
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0
        value, *other = plain(*other, taken(batch, rows))
        np.testing.assert_allclose(selected.value, value, rtol=1e-6)
        jax.tree.map(assert_close, params, other[0])


@functools.cache
def scored(exclude=(), through=True, optimizer=OPTIMIZERS["clipped"], remat=False):
    """What policies see, at a second step, and the arguments of the step."""
    params = init()
    first = jax.jit(functools.partial(plain_step, optimizer))
    _, params, state = first(params, optimizer.init(params), draw(2, N))
    args = params, state, draw(3, N), draw(1, V)
    seen = {}

    def policy(rows, k):
        seen.update(
            scores=rows.scores, losses=rows.losses, norms=rows.squared_norms, gram=rows.gram
        )
        jax.debug.callback(lambda found: seen.update(found), dict(seen))
        return by_score(rows, k)

    options = {"exclude": exclude, "through_optimizer": through, "remat": remat}
    step = select_step(loss_fn, optimizer, K, policy, **options)
    jax.block_until_ready(step(*args))
    jax.effects_barrier()
    return seen, args, optimizer


@pytest.mark.parametrize(
    "exclude", [pytest.param((), marks=pytest.mark.slow), EXCLUDE], ids=["all", "some"]
)
def test_what_policies_see_is_that_of_per_row_autodiff(exclude, standard_promotion):
    seen, (params, state, batch, val), optimizer = scored(exclude)
    grads, val_grads = per_row_grads(params, batch), jax.jit(jax.grad(mean_loss))(params, val)
    if exclude:
        grads, val_grads = zeroed(grads), zeroed(val_grads)

    def moved(gradient):
        return optimizer.update(gradient, state, params)[0]

    mean = jax.tree.map(lambda leaf: leaf.mean(0), grads)
    of_rows = jax.jit(jax.vmap(lambda tangent: jax.jvp(moved, (mean,), (tangent,))[1]))(grads)
    assert_close(seen["scores"], -dots(of_rows, val_grads) / K)
    assert_close(seen["losses"], loss_fn(params, batch))
    flat = jnp.concatenate([leaf.reshape(N, -1) for leaf in jax.tree.leaves(grads)], axis=1)
    assert_close(seen["gram"], flat @ flat.T)
    assert_close(seen["norms"], jnp.sum(flat**2, axis=1))


@pytest.mark.quick("some")
@pytest.mark.parametrize("exclude", [(), EXCLUDE], ids=["all", "some"])
def test_plain_scores(exclude, standard_promotion):
    seen, (params, _, batch, val), _ = scored(exclude, False)
    val_grads = jax.jit(jax.grad(mean_loss))(params, val)
    val_grads = zeroed(val_grads) if exclude else val_grads
    assert_close(seen["scores"], dots(per_row_grads(params, batch), val_grads) / K)


@pytest.mark.slow
def test_scores_made_again_are_those_kept(standard_promotion):
    assert_close(scored(remat=True)[0]["scores"], scored()[0]["scores"])


def rows_of(policy, seeds=(0,)):
    """Of one step after another, the rows and the arguments."""
    optimizer, params = optax.sgd(0.1), init()
    step = select_step(loss_fn, optimizer, K, policy, through_optimizer=False)
    args = params, optimizer.init(params), draw(3, N), draw(1, V)
    return [step(*args, key=jax.random.key(seed))[2].rows.tolist() for seed in seeds]


@pytest.mark.slow
def test_policies_choose_by_what_they_are_named_for(standard_promotion):
    seen, *_ = scored((), False)
    for policy, measure in ((by_loss, -seen["losses"]), (by_norm, seen["norms"])):
        assert rows_of(policy) == [sorted(np.argsort(-np.asarray(measure))[:K])]
    greedy = selection.greedy(seen["scores"], seen["gram"], K, 0.1)
    assert rows_of(
        lambda rows, k: selection.greedy(rows.scores, rows.gram, k, interaction=0.1)
    ) == [selection.rows(greedy, K).tolist()]
    drawn = rows_of(at_random, [*range(9), 0])
    assert len(set(map(tuple, drawn))) > 1
    assert drawn[0] == drawn[-1]


@pytest.mark.slow
def test_weights_of_a_policy_weigh_rows():
    given = jnp.array([0.0, 3.0, 0.0, 1.0, 0.0, 0.5])
    optimizer, params, batch = optax.sgd(1.0), init(), draw(3, N)
    step = select_step(loss_fn, optimizer, 2, lambda rows, k: given)
    found, _, selected = step(params, optimizer.init(params), batch, draw(1, V))
    assert selected.rows.tolist() == [1, 3]  # the largest two
    share = jnp.array([0.0, 0.75, 0.0, 0.25, 0.0, 0.0])
    value, grads = jax.value_and_grad(lambda params: share @ loss_fn(params, batch))(params)
    np.testing.assert_allclose(selected.value, value, rtol=1e-6)
    jax.tree.map(lambda a, b, g: assert_close(a, b - g), found, params, grads)


def test_a_row_of_score_nan_is_never_trained_on(standard_promotion):
    optimizer, params, batch = optax.adamw(1e-2), {"w": jnp.ones(3)}, {"x": jnp.ones((4, 3))}
    batch["x"] = batch["x"].at[1].set(jnp.nan).at[2].set(jnp.inf)

    def losses(params, batch):
        return jnp.square(batch["x"] @ params["w"])

    step = select_step(losses, optimizer, 3, through_optimizer=False)
    val = {"x": jnp.ones((2, 3))}
    found, _, selected = step(params, optimizer.init(params), batch, val)
    assert selected.rows.tolist() == [0, 3, -1]
    assert jnp.isfinite(found["w"]).all()
    assert (found["w"] != params["w"]).all()
    assert selected.value == 9


@pytest.mark.slow
def test_without_any_row_nothing_changes(standard_promotion):
    optimizer, params = optax.adamw(1e-2), init()
    state = optimizer.init(params)
    step = select_step(loss_fn, optimizer, K, lambda rows, k: rows.scores * jnp.nan)
    found, after, selected = step(params, state, draw(3, N), draw(1, V))
    assert selected.rows.tolist() == [-1] * K
    jax.tree.map(np.testing.assert_array_equal, (found, after), (params, state))


def test_what_a_policy_does_not_ask_for_costs_nothing():
    optimizer, params = optax.sgd(0.1), init()
    args = params, optimizer.init(params), draw(3, N), draw(1, V)

    def flops(policy, exclude=()):
        step = select_step(loss_fn, optimizer, K, policy, exclude=exclude)
        return step.lower(*args, key=jax.random.key(0)).compile().cost_analysis()["flops"]

    of_random, of_loss, of_score = map(flops, (at_random, by_loss, by_score))
    assert of_random < of_loss < of_score
    assert flops(by_score, EXCLUDE) < of_score


def stepped(exclude=(), k=K, policy=by_score, loss_fn=loss_fn, params=None, **options):
    optimizer, params = optax.sgd(0.1), init() if params is None else params
    step = select_step(loss_fn, optimizer, k, policy, exclude=exclude, **options)
    return step(params, optimizer.init(params), draw(3, N), draw(1, V))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": N + 1}, ValueError, r"k must be from 1 to the number of rows, 6, got 7\."),
        ({"k": 0}, ValueError, r"k must be from 1 to the number of rows, 6, got 0\."),
        (
            {"exclude": ["embed", "layers/*"]},
            ValueError,
            r"fit no parameter: 'layers/\*'.*\n  blocks/0/bias\n.*\n.*\n.*\n  embed",
        ),
        ({"exclude": ["*"]}, ValueError, r"leaves out every parameter.*'\*'"),
        ({"exclude": "embed"}, TypeError, "must be a sequence of patterns, got the string 'embed'"),
        ({"policy": at_random}, ValueError, r"draws at random: give the step a key="),
        (
            {"policy": lambda rows, k: rows.scores[:2]},
            ValueError,
            r"floating point \[6\], one for each candidate. Found float32\[2\]",
        ),
        ({"policy": lambda rows, k: jnp.arange(N)}, ValueError, r"Found int32\[6\]"),
        (
            {"loss_fn": mean_loss},
            ValueError,
            r"must return the losses of all rows, \[2\] of this batch. Found float32\[\]",
        ),
        (
            {"params": {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}},
            ValueError,
            "must have different paths, but several are a/b",
        ),
    ],
    ids=["k", "k 0", "pattern", "all", "string", "key", "size", "dtype", "losses", "paths"],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        stepped(**options)


def test_signs_have_no_derivative(standard_promotion):
    optimizer, params = optax.lion(1e-3), init()
    step = select_step(loss_fn, optimizer, K)
    with pytest.raises(ValueError, match="update has derivative zero"):
        step(params, optimizer.init(params), draw(3, N), draw(1, V))
