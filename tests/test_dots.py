"""value_grad_and_dots against per-row autodiff: for models of the table and for plain functions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ghostjax import conservation_error, testing, value_grad_and_dots
from ghostjax._walk import _walk
from tests.linen.cases import CASES

ROWS, POSITIONS, FEATURES = 6, 6, 5  # T = B: no axis is told by its size


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def direction_like(params):
    generator = np.random.default_rng(9)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype), params
    )


def expected_dots(row_losses, params, batch, direction):
    grads = testing.per_example_grads(row_losses, params, batch)
    return jax.tree.map(
        lambda rows, vector: np.tensordot(
            np.asarray(rows, np.float64), np.asarray(vector, np.float64), axes=vector.ndim
        ),
        grads,
        direction,
    )


def check(row_losses, params, batch, reduction="mean", *, exact_gradient=True):
    """Dots, value, gradient and certificate of the mean or sum of ``row_losses``."""
    reduce = {"mean": jnp.mean, "sum": jnp.sum}[reduction]
    direction = direction_like(params)

    def loss_fn(params, batch):
        return reduce(row_losses(params, batch))

    fn = value_grad_and_dots(loss_fn, loss_reduction=reduction)
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(params, batch, direction)
    testing.assert_dots_close(
        result.dots, expected_dots(row_losses, params, batch, direction), rtol=1e-5
    )
    value, grads = jax.jit(jax.value_and_grad(loss_fn))(params, batch)
    if exact_gradient:
        chex.assert_trees_all_equal((result.value, result.grads), (value, grads))
    else:
        chex.assert_trees_all_close((result.value, result.grads), (value, grads), rtol=1e-5)
    errors = jax.tree.leaves(conservation_error(result, direction))
    assert max(errors) <= 1e-5
    return result


TABLE = [
    "layernorm_rank_3",
    "groupnorm",
    "einsum_heads",
    "tied_head",
    "convolutions",
    "attention",
    "lstm",
    "optimized_lstm",
    "bidirectional",
    "recurrent_time_major",
    "shared_three_times",
    "scan_over_layers",
    "scan_with_shared_weights",
    "vmap_ensemble",
    "time_major_layers",
    "own_module_with_custom_vjp",
    "branches",
    "positions_in_a_module_of_their_own",
    "stopped_gradient",
]


@pytest.mark.parametrize("name", TABLE)
def test_flax_models(name, standard_promotion):
    check(*CASES[name](ROWS, POSITIONS, jnp.float32))


@pytest.mark.parametrize("name", ["remat", "scan_of_remat"])
def test_rematerialised_models(name, standard_promotion):
    check(*CASES[name](ROWS, POSITIONS, jnp.float32), exact_gradient=False)


FUNCTIONS = {}


def function(build):
    FUNCTIONS[build.__name__] = build
    return build


def mean_squares(outputs):
    return jnp.mean(jnp.square(outputs).reshape(outputs.shape[0], -1), axis=1)


def activations(seed=1):
    return draw(ROWS, POSITIONS, FEATURES, seed=seed)


@function
def positions_without_rows():
    def losses(params, x):
        x = jnp.tanh(x + params["positions"][None])
        return mean_squares(x @ params["w"])

    return losses, {"positions": draw(POSITIONS, FEATURES), "w": draw(FEATURES, 3)}, activations()


@function
def class_token():
    def losses(params, x):
        token = jnp.broadcast_to(params["token"], (x.shape[0], 1, FEATURES))
        x = jnp.tanh(jnp.concatenate([token, x], axis=1) @ params["w"])
        return jnp.sum(x[:, 0] ** 2, axis=-1) + jnp.mean(x, axis=(1, 2))

    return losses, {"token": draw(1, 1, FEATURES), "w": draw(FEATURES, FEATURES)}, activations()


@function
def layers_on_merged_axes():
    def losses(params, x):
        flat = jnp.tanh(x.reshape(-1, FEATURES) @ params["rows_first"])
        x = flat.reshape(x.shape)
        flat = jnp.tanh(jnp.swapaxes(x, 0, 1).reshape(-1, FEATURES) @ params["time_first"])
        return mean_squares(jnp.swapaxes(flat.reshape(POSITIONS, ROWS, -1), 0, 1))

    params = {"rows_first": draw(FEATURES, FEATURES), "time_first": draw(FEATURES, 4, seed=3)}
    return losses, params, activations()


@function
def low_rank_adapter():
    frozen = draw(FEATURES, FEATURES, seed=4)

    def losses(params, x):
        return mean_squares(jnp.sin(x @ (frozen + params["a"] @ params["b"])))

    return losses, {"a": draw(FEATURES, 2), "b": draw(2, FEATURES, seed=2)}, activations()


@function
def standardised_weights():
    def losses(params, x):
        w = params["w"]
        w = (w - w.mean(0, keepdims=True)) / (w.std(0, keepdims=True) + 1e-3)
        w = w / jnp.linalg.norm(w)
        return mean_squares(jnp.sin(x @ w))

    return losses, {"w": draw(FEATURES, 4)}, activations()


@function
def mixture_of_experts():
    def losses(params, x):
        gates = jax.nn.softmax(x @ params["gate"], axis=-1)
        experts = jnp.einsum("btd,edo->beto", x, params["experts"])
        return mean_squares(jnp.einsum("bte,beto->bto", gates, jnp.tanh(experts)))

    return losses, {"gate": draw(FEATURES, 3), "experts": draw(3, FEATURES, 4)}, activations()


@function
def einsum_of_three():
    def losses(params, batch):
        return jnp.einsum("bte,bto,eo->b", jnp.sin(batch[0]), batch[1], params["w"]) ** 2

    return losses, {"w": draw(FEATURES, FEATURES)}, (activations(1), activations(2))


@function
def layers_in_a_loop():
    def losses(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w + params["shared"][None, None]), jnp.sum(w**2)

        x, _ = jax.lax.scan(layer, x, params["layers"])
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x * params["gain"]), x)
        return mean_squares(x)

    params = {
        "layers": draw(3, FEATURES, FEATURES),
        "shared": draw(FEATURES),
        "gain": jnp.float32(1.3),
    }
    return losses, params, activations()


@function
def learned_initial_state():
    def losses(params, x):
        def cell(h, x):
            h = jnp.tanh(x @ params["w"] + h @ params["u"])
            return h, h

        start = jnp.broadcast_to(params["start"], (ROWS, FEATURES))
        _, outputs = jax.lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
        return mean_squares(jnp.swapaxes(outputs, 0, 1))

    params = {
        "w": draw(FEATURES, FEATURES),
        "u": draw(FEATURES, FEATURES, seed=2),
        "start": draw(1, FEATURES),
    }
    return losses, params, activations()


@function
def weights_that_evolve_in_the_loop():
    def losses(params, x):
        def layer(carry, _):
            x, w = carry
            return (jnp.tanh(x @ w), w @ params["step"]), None

        (x, w), _ = jax.lax.scan(layer, (x, params["w"]), None, length=3)
        return mean_squares(x @ w)

    params = {"w": draw(FEATURES, FEATURES), "step": draw(FEATURES, FEATURES, seed=2) / 2}
    return losses, params, activations()


@function
def branch_and_checkpoint():
    def losses(params, x):
        @jax.checkpoint
        def block(x, w):
            return jnp.tanh(x @ w)

        policy = jax.checkpoint_policies.dots_saveable
        for flag in (0, 1):
            x = jax.lax.cond(flag > 0, block, lambda x, w: jnp.sin(x @ w.T), x, params["w"])
        return mean_squares(jax.checkpoint(block, policy=policy)(x, params["w"]))

    return losses, {"w": draw(FEATURES, FEATURES)}, activations()


@function
def custom_jvp_with_a_parameter():
    @jax.custom_jvp
    def gate(x, slope):
        return jnp.where(x > 0, x, x * slope)

    @gate.defjvp
    def _(primals, tangents):
        return jax.jvp(lambda x, slope: jnp.where(x > 0, x, x * slope), primals, tangents)

    def losses(params, x):
        return mean_squares(gate(x, params["slope"]))

    return losses, {"slope": jnp.float32(0.2)}, activations()


@function
def embedding_and_labels():
    def losses(params, batch):
        x = jnp.take(params["table"], batch["ids"], axis=0) + params["table"][batch["ids"] // 2]
        logits = jnp.tanh(x) @ params["table"].T
        log_probs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs, batch["ids"][..., None], axis=-1)[..., 0]
        smoothed = -(0.9 * picked + 0.1 * log_probs.mean(-1))
        return jnp.sum(smoothed * batch["mask"], axis=1) / jnp.sum(batch["mask"], axis=1)

    generator = np.random.default_rng(0)
    batch = {
        "ids": jnp.asarray(generator.integers(0, 7, (ROWS, POSITIONS))),
        "mask": jnp.asarray(generator.integers(0, 2, (ROWS, POSITIONS)), jnp.float32)
        .at[:, 0]
        .set(1),
    }
    return losses, {"table": draw(7, FEATURES)}, batch


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, reduction):
    check(*FUNCTIONS[name](), reduction, exact_gradient="checkpoint" not in name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_per_example(name):
    """The loss of one row, vectorized: the same results without any tracking."""
    losses, params, batch = FUNCTIONS[name]()
    if name in ("layers_on_merged_axes", "learned_initial_state"):
        pytest.skip("is written for ROWS rows")
    direction = direction_like(params)

    def one(params, row):
        return losses(params, jax.tree.map(lambda leaf: leaf[None], row))[0], row

    fn = value_grad_and_dots(one, per_example=True, has_aux=True)
    result = jax.jit(lambda p, b, v: fn(p, b, direction=v))(params, batch, direction)
    testing.assert_dots_close(result.dots, expected_dots(losses, params, batch, direction))
    chex.assert_trees_all_equal(result.aux, batch)
    grads = jax.grad(lambda p: losses(p, batch).mean())(params)
    chex.assert_trees_all_close(result.grads, grads, rtol=1e-4, atol=1e-6)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


DENSE = {"w": draw(FEATURES, 4), "b": draw(4)}
X = draw(ROWS, FEATURES, seed=1)


def test_weight_decay_belongs_to_no_row():
    def loss_fn(params, x):
        decay = sum(jnp.sum(leaf**2) for leaf in params.values())
        return jnp.mean(mean_squares(dense(params, x))) + 0.1 * decay

    direction = direction_like(DENSE)
    result = value_grad_and_dots(loss_fn)(DENSE, X, direction=direction)
    expected = expected_dots(lambda p, x: mean_squares(dense(p, x)), DENSE, X, direction)
    testing.assert_dots_close(result.dots, expected)
    for name in DENSE:
        decay = 0.2 * jnp.vdot(DENSE[name], direction[name])
        np.testing.assert_allclose(result.shared[name], decay, rtol=1e-5)
    assert max(jax.tree.leaves(conservation_error(result, direction))) <= 1e-5


def test_a_mean_over_all_tokens_of_the_batch():
    """Rows count by their tokens: dots[i] is row i's share, times B for "mean"."""
    mask = jnp.asarray(np.random.default_rng(3).integers(0, 2, (ROWS, 4)), jnp.float32)

    def shares(params, batch):
        losses = jnp.square(dense(params, batch["x"])) * batch["mask"]
        return jnp.sum(losses, axis=1) / jnp.sum(batch["mask"])

    check(shares, DENSE, {"x": X, "mask": mask}, "sum")


MIXING = {
    "batch_norm": lambda p, x: dense(p, x) - dense(p, x).mean(0, keepdims=True),
    "batch_norm_jitted": lambda p, x: jax.jit(lambda h: h - h.mean(0, keepdims=True))(dense(p, x)),
    "contrastive": lambda p, x: jax.nn.log_softmax(dense(p, x) @ dense(p, x).T),
    "sorted": lambda p, x: jnp.sort(dense(p, x), axis=0) @ p["w"].T,
    "reversed": lambda p, x: dense(p, x)[::-1] @ p["w"].T,
    "rolled": lambda p, x: jnp.roll(dense(p, x), 1, axis=0) @ p["w"].T,
    "gathered": lambda p, x: dense(p, x)[jnp.array([1, 0, 2, 3, 5, 4])] @ p["w"].T,
    "looped_over_rows": lambda p, x: jax.lax.map(lambda row: row @ p["w"], x),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixed_rows_are_an_error_that_names_the_place(name):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(jnp.square(MIXING[name](p, x))))
    with pytest.raises(ValueError, match=r"test_dots\.py:\d+(.|\n)*per_example=True"):
        fn(DENSE, X, direction=DENSE)


def test_a_missed_channel_shows_by_name(monkeypatch):
    def loss_fn(params, x):
        return jnp.mean(mean_squares(dense(params, x)))

    attach = _walk.attach_channel

    def all_but_one(outputs, tangents, *rest):
        tangents = {path: found for path, found in tangents.items() if "['b']" not in path}
        return attach(outputs, tangents, *rest)

    monkeypatch.setattr(_walk, "attach_channel", all_but_one)
    direction = direction_like(DENSE)
    result = value_grad_and_dots(loss_fn)(DENSE, X, direction=direction)
    errors = conservation_error(result, direction)
    assert errors["w"] <= 1e-5
    assert errors["b"] >= 0.99


def test_stacked_directions():
    """vmap over directions repeats the tangent products, not the forward and backward pass."""
    width = 64
    params = {"w1": draw(width, width), "w2": draw(width, width)}
    x = draw(256, width)

    def loss_fn(params, x):
        return jnp.mean(mean_squares(jnp.tanh(x @ params["w1"]) @ params["w2"]))

    fn = value_grad_and_dots(loss_fn)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf, leaf**2]), params)

    def many(params, x, directions):
        run = jax.vmap(lambda v: fn(params, x, direction=v).dots)
        return run(directions)

    dots = jax.jit(many)(params, x, stacked)
    single = fn(params, x, direction=params).dots
    testing.assert_dots_close(jax.tree.map(lambda leaf: leaf[0], dots), single)
    testing.assert_dots_close(
        jax.tree.map(lambda leaf: leaf[1], dots), jax.tree.map(lambda leaf: 2 * leaf, single)
    )

    def flops(count):
        some = jax.tree.map(lambda leaf: leaf[:count], stacked)
        return jax.jit(many).lower(params, x, some).compile().cost_analysis()["flops"]

    product = 2 * 2 * 256 * width * width
    assert flops(4) - flops(1) <= 1.05 * 3 * product


def test_in_a_scan_over_microbatches():
    direction = direction_like(DENSE)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))

    @jax.jit
    def run(batches):
        def step(total, x):
            result = fn(DENSE, x, direction=direction)
            return jax.tree.map(jnp.add, total, result.grads), result.dots

        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, DENSE), batches)

    _, dots = run(X.reshape(2, 3, FEATURES))
    joined = jax.tree.map(lambda leaf: leaf.reshape(-1), dots)
    testing.assert_dots_close(joined, fn(DENSE, X, direction=direction).dots)


def test_arguments_in_any_place_and_aux():
    def loss_fn(scale, x, key, params, *, shift, name="unused"):
        noise = jax.random.normal(key, x.shape)
        losses = mean_squares(dense(params, x + noise)) * scale + shift
        return jnp.mean(losses), {"noise": noise}

    key = jax.random.key(0)
    direction = direction_like(DENSE)
    fn = value_grad_and_dots(loss_fn, argnums=3, batch_argnums=1, has_aux=True)
    result = fn(2.0, X, key, DENSE, shift=0.5, direction=direction, name="x")
    plain = jax.value_and_grad(loss_fn, argnums=3, has_aux=True)
    (value, aux), grads = plain(2.0, X, key, DENSE, shift=0.5)
    chex.assert_trees_all_close((result.value, result.aux, result.grads), (value, aux, grads))

    def rows(params, x):
        return 2 * mean_squares(dense(params, x + aux["noise"]))

    testing.assert_dots_close(result.dots, expected_dots(rows, DENSE, X, direction))


def test_several_parameter_arguments():
    def loss_fn(w, x, b):
        return jnp.mean(mean_squares(jnp.tanh(x @ w + b[None])))

    fn = value_grad_and_dots(loss_fn, argnums=(0, 2))
    w, b = DENSE["w"], DENSE["b"]
    result = fn(w, X, b, direction=(w, b))
    single = value_grad_and_dots(lambda p, x: loss_fn(p["w"], x, p["b"]))(DENSE, X, direction=DENSE)
    testing.assert_dots_close(list(result.dots), [single.dots["w"], single.dots["b"]])


def test_bfloat16_dots_are_float32(standard_promotion):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), DENSE)
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x)).astype(jnp.float32)))
    result = fn(params, X.astype(jnp.bfloat16), direction=params)
    assert {leaf.dtype for leaf in jax.tree.leaves(result.dots)} == {jnp.dtype(jnp.float32)}
    rows = expected_dots(
        lambda p, x: mean_squares(dense(p, x)), params, X.astype(jnp.bfloat16), params
    )
    testing.assert_dots_close(result.dots, rows, rtol=1e-2)


def test_an_nnx_module():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            # Without biases: softmax makes the gradient of the keys' bias zero but for rounding.
            self.attention = nnx.MultiHeadAttention(2, 8, decode=False, use_bias=False, rngs=rngs)
            self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(self.norm(x))
            return self.embed.attend(jnp.tanh(self.conv(x)))

    graph, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (ROWS, POSITIONS)))

    def losses(params, tokens):
        log_probs = jax.nn.log_softmax(nnx.merge(graph, params)(tokens))
        return -jnp.take_along_axis(log_probs, tokens[..., None], axis=-1).mean(axis=(1, 2))

    check(losses, params, tokens)


def test_differentiating_the_dots_is_refused():
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        jax.grad(lambda p: fn(p, X, direction=DENSE).total().sum())(DENSE)


def test_dots_lower_for_accelerators():
    fn = value_grad_and_dots(lambda p, x: jnp.mean(mean_squares(dense(p, x))))
    jitted = jax.jit(lambda p, x, v: fn(p, x, direction=v).dots)
    exported = jax.export.export(jitted, platforms=["tpu", "cuda"])(DENSE, X, DENSE)
    assert exported.platforms == ("tpu", "cuda")


@pytest.mark.parametrize(
    ("direction", "message"),
    [
        ({"w": DENSE["w"]}, "direction must be a tree like the parameters"),
        ({**DENSE, "b": jnp.ones(3)}, r"\['b'\]: expected float32\[4\], found float32\[3\]"),
        ({**DENSE, "b": jnp.ones(4, jnp.bfloat16)}, r"found bfloat16\[4\]"),
    ],
)
def test_directions_that_do_not_fit(direction, message):
    fn = value_grad_and_dots(lambda p, x: jnp.mean(dense(p, x)))
    with pytest.raises(ValueError, match=message):
        fn(DENSE, X, direction=direction)


def test_losses_that_are_not_scalars():
    fn = value_grad_and_dots(lambda p, x: mean_squares(dense(p, x)))
    with pytest.raises(ValueError, match=r"must return a scalar loss.*float32\[6\]"):
        fn(DENSE, X, direction=DENSE)


def test_loss_reduction_of_another_name():
    with pytest.raises(ValueError, match='must be "mean" or "sum", got \'max\''):
        value_grad_and_dots(lambda p, x: 0.0, loss_reduction="max")


def test_a_while_loop():
    def loss_fn(params, x):
        h = jax.lax.while_loop(lambda h: h.sum() < 0, lambda h: h * params["b"][None], x[:, :4])
        return jnp.mean(h)

    with pytest.raises(NotImplementedError, match=r"while at .*test_dots.py:\d+: a while loop"):
        value_grad_and_dots(loss_fn)(DENSE, X, direction=DENSE)


def test_what_cannot_be_walked_is_refused():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def loss_fn(params, x):
        run = jax.shard_map(dense, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
        return jnp.mean(run(params, x))

    with pytest.raises(NotImplementedError, match=r"shard_map.*\['b'\].*cannot be walked"):
        value_grad_and_dots(loss_fn)(DENSE, X, direction=DENSE)
