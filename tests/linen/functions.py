"""The table of bare functions for the engine: losses [N] of arrays and trees of arrays.

Each gives (loss_fn, params, batch, further arguments...).
"""

import jax
import jax.numpy as jnp
import numpy as np

from models.modules.table import activations, row_means

N, T, F = 7, 5, 4
FUNCTIONS = {}


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


W, V, B = draw(F, 3), draw(F, 3, seed=1), draw(3, seed=2)
X, XT = jnp.asarray(activations(N, F)), jnp.asarray(activations(N, T, F))
PICKS = jnp.array([1, 0, 2, 4, 3, 6, 5])


def means(outputs):
    return row_means(jnp.square(outputs - 0.3))


def entry(name, outputs, params, batch=X, *others, slow=False):
    """A case whose loss is the mean square of ``outputs(params, batch, ...)``."""

    def losses(params, batch, *others):
        return means(outputs(params, batch, *others))

    FUNCTIONS[name] = (losses, params, batch, *others), slow


def dense(p, x):
    return jnp.tanh(x @ p["w"] + p["b"].reshape((1,) * (x.ndim - 1) + (3,)))


P = {"w": W, "b": B}

# Rows: where they are, and what of other rows is no part of the gradient.

entry("batch_minus_its_mean", lambda p, x: dense(p, x - x.mean(0, keepdims=True)), P)
entry(
    "statistics_of_the_batch_stopped",
    lambda p, x: dense(p, x) - jax.lax.stop_gradient(dense(p, x).mean(0, keepdims=True)),
    P,
)
entry("rows_and_positions_merged", lambda p, x: dense(p, x.reshape(-1, F)).reshape(N, T, 3), P, XT)
entry(
    "positions_first_and_merged",
    lambda p, x: jnp.swapaxes(
        dense(p, jnp.swapaxes(x, 0, 1).reshape(-1, F)).reshape(T, N, 3), 0, 1
    ),
    P,
    XT,
)
entry("vmap_over_rows", lambda p, x: jax.vmap(lambda row: jnp.sin(row @ p["w"]) + p["b"])(x), P)
entry(
    "an_equation_that_nothing_needs",
    lambda p, x: (dense(p, x), dense(p, x) - dense(p, x).mean(0, keepdims=True))[0],
    P,
)
entry(
    "a_branch_that_rows_choose",
    lambda p, x: jax.lax.cond(
        x.sum() > 0, lambda x: (1.0, x @ p["w"]), lambda x: (2.0, x @ p["v"]), x
    )[1],
    {"w": W, "v": V},
)
entry(
    "a_branch_of_activations_that_rows_choose",
    lambda p, x: jax.lax.cond(x.sum() > 0, jnp.sin, jnp.cos, dense(p, x)),
    P,
)
entry(
    "a_branch_of_parameters",
    lambda p, x, c: x @ jax.lax.cond(c > 0, lambda: p["w"], lambda: p["v"] * 2),
    {"w": W, "v": V},
    X,
    jnp.float32(1),
)

# Parameters: shapes, and what becomes of them.

entry("scalars", lambda p, x: x * p["s"] + p["t"], {"s": jnp.float32(1.3), "t": jnp.float32(0.1)})
entry("the_parameters_are_one_array", lambda p, x: jnp.sin(x @ p), W)
entry("unused", lambda p, x: dense(p, x), {**P, "unused": B})
entry("none_used", lambda p, x: x, {"unused": B})
entry("one_row_of_parameters_each", lambda p, x: jnp.sin(x * p), draw(N, F, seed=3))
entry("one_matrix_each", lambda p, x: jnp.einsum("nf,nfo->no", x, p["w"]), {"w": draw(N, F, 3)}, X)
entry(
    "one_row_of_parameters_each_and_for_all",
    lambda p, x: x * p[:N] * p[0, 0],
    draw(N + 1, F, seed=3),
)
entry(
    "looked_up_in_the_row's_own_table",
    lambda p, b: jnp.take_along_axis(p, b["i"], axis=1) * b["x"],
    draw(N, 9),
    {"x": X, "i": jnp.asarray(np.random.default_rng(0).integers(0, 9, (N, F)))},
)
entry("looked_up_by_row", lambda p, b: p[b["i"]] * b["x"], draw(6, F, seed=3), {"x": X, "i": PICKS})
entry(
    "repeated_for_every_entry",
    lambda p, x: jnp.sin(x * jnp.broadcast_to(p, x.shape)),
    draw(T, F),
    XT,
)
entry(
    "positions",
    lambda p, x: jnp.sin(x + p["t"][jnp.arange(T)][None]) @ p["w"],
    {**P, "t": draw(9, F)},
    XT,
)
entry(
    "low_rank",
    lambda p, x: jnp.sin(x @ (W + p["a"] @ p["b"])),
    {"a": draw(F, 2), "b": draw(2, 3)},
    XT,
)
entry(
    "low_rank_one_by_one",
    lambda p, x: jnp.sin(x @ W + x @ p["a"] @ p["b"]),
    {"a": draw(F, 2), "b": draw(2, 3)},
    XT,
)
entry(
    "product_of_three",
    lambda p, x: x @ (p["a"] @ p["b"] @ p["c"]),
    {"a": draw(F, 2), "b": draw(2, 2, seed=1), "c": draw(2, 3, seed=2)},
)
entry("tied", lambda p, x: jnp.tanh(x @ p) @ p.T, W, XT)
entry("sliced", lambda p, x: x @ jax.lax.dynamic_slice(p, (1, 0), (F, 3)), draw(F + 3, 3))
entry(
    "sliced_where_an_argument_says",
    lambda p, x, i: x @ jax.lax.dynamic_slice(p, (i, 0), (F, 3)),
    draw(F + 3, 3),
    X,
    jnp.int32(1),
)
entry(
    "sliced_where_rows_say",
    lambda p, b: jax.vmap(lambda x, i: x @ jax.lax.dynamic_slice(p, (i, 0), (F, 3)))(
        b["x"], b["i"] % 3
    ),
    draw(F + 3, 3),
    {"x": X, "i": PICKS},
)
entry("gathered", lambda p, x: x @ p[jnp.array([0, 2, 1, 1])] + p[1][None], draw(F, 3))
entry("straight_through", lambda p, x: x @ (p + jax.lax.stop_gradient(jnp.round(p) - p)), W)
entry(
    "written_into_data", lambda p, x: x.at[:, 1].set(p).at[:, 2].add(p * 2) ** 2, jnp.float32(0.4)
)
entry(
    "joined_with_data",
    lambda p, x: jnp.concatenate([x, jnp.broadcast_to(p[None, :2], (N, 2))], 1) * p[None],
    draw(6),
)
entry(
    "chosen_by_data",
    lambda p, x: jnp.where(x > 0, p["a"][None], p["b"][None]) * x,
    {"a": draw(F), "b": draw(F, seed=3)},
)
entry(
    "elementwise",
    lambda p, x: (
        jnp.power(jnp.abs(x) + 0.1, p["a"][None])
        + jnp.arctan2(x, p["b"][None])
        + jnp.maximum(x, p["a"][None]) / p["b"][None]
    ),
    {"a": jnp.abs(draw(F)), "b": jnp.abs(draw(F, seed=3)) + 1},
)
entry("inverted", lambda p, x: x @ jnp.linalg.inv(p + 5 * jnp.eye(F)), draw(F, F), slow=True)

# Products.

entry("one_matrix_per_position", lambda p, x: jnp.einsum("ntf,tfo->nto", x, p), draw(T, F, 3), XT)
entry(
    "one_matrix_per_head",
    lambda p, x: jnp.einsum("nthf,hfo->ntho", x.reshape(N, T, 2, 2), p),
    draw(2, 2, 3),
    XT,
)
entry("bilinear", lambda p, x: jnp.einsum("nf,fgh,ng->nh", x, p, jnp.cos(x)), draw(F, F, 3))
entry(
    "experts",
    lambda p, x: jnp.einsum(
        "nk,nkfo,nf->no",
        *jax.lax.top_k(jax.nn.softmax(x @ p["g"]), 2)[:1],
        p["e"][jax.lax.top_k(x @ p["g"], 2)[1]],
        x,
    ),
    {"g": draw(F, 4), "e": draw(4, F, 3, seed=3)},
)


def convolution(x, kernel, names, **options):
    options = {"window_strides": (1,), "padding": "SAME"} | options
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=names, **options)


entry(
    "convolutions",
    lambda p, x: jnp.moveaxis(
        convolution(
            jnp.moveaxis(jnp.tanh(convolution(x, p["k"], ("NCH", "OIH", "NCH"))), 0, 2),
            p["l"],
            ("CHN", "HIO", "HNC"),
        ),
        1,
        0,
    ),
    {"k": draw(3, T, 3), "l": draw(2, 3, 2, seed=4)},
    XT,
)
entry(
    "dilated_convolution_in_groups",
    lambda p, x: convolution(
        x, p, ("NHC", "HIO", "NHC"), padding=[(1, 2)], rhs_dilation=(2,), feature_group_count=2
    ),
    draw(3, 2, 4),
    XT,
)

# Loops.

L = draw(3, F, F)


def scanned(body, start, xs=None, **options):
    return jax.lax.scan(body, start, xs, **options)


entry(
    "scan_shared", lambda p, x: scanned(lambda c, _: (jnp.tanh(c @ p), None), x, length=3)[0], L[0]
)
entry(
    "scan_stacked_in_reverse",
    lambda p, x: jnp.moveaxis(
        scanned(lambda c, w: (jnp.tanh(c @ w), c @ w), x, p, reverse=True)[1], 1, 0
    ),
    L,
)
entry("scan_of_one", lambda p, x: scanned(lambda c, w: (jnp.tanh(c @ w), None), x, p)[0], L[:1])
entry(
    "scan_and_outside",
    lambda p, x: scanned(lambda c, w: (jnp.tanh(c @ w), None), x, p)[0] @ p[1],
    L,
)
entry(
    "scan_of_what_is_made_of_parameters",
    lambda p, x: scanned(lambda c, w: (jnp.tanh(c @ jnp.sin(w)), None), x, p / jnp.linalg.norm(p))[
        0
    ],
    L,
)
entry(
    "scan_in_another_order",
    lambda p, x: scanned(lambda c, i: (jnp.tanh(c @ p[i]), None), x, jnp.array([2, 0, 0]))[0],
    L,
)
entry(
    "scan_in_a_scan",
    lambda p, x: scanned(
        lambda c, w: scanned(
            lambda c, v: (jnp.tanh(c @ v * p["s"]), None), c * p["s"], w, reverse=True
        ),
        x,
        p["w"],
    )[0],
    {"w": draw(2, 3, F, F), "s": jnp.float32(1.1)},
    slow=True,
)
entry(
    "shared_scan_in_a_stacked_one",
    lambda p, x: scanned(
        lambda c, w: (scanned(lambda c, _: (jnp.tanh(c @ w), None), c, length=3)[0], None), x, p
    )[0],
    L,
)
entry(
    "weights_in_the_carry",
    lambda p, x: scanned(
        lambda c, _: ((jnp.tanh(c[0] @ c[1]), jnp.sin(c[1])), None), (x, p), length=3
    )[0][0],
    L[0],
)
entry(
    "branches_in_a_scan_of_remat",
    lambda p, x: scanned(
        jax.checkpoint(
            lambda h, wi: (
                jax.lax.cond(
                    wi[1] % 2, lambda h: jnp.tanh(h @ wi[0]), lambda h: h @ wi[0].T * p["s"], h
                ),
                None,
            )
        ),
        x,
        (p["w"], jnp.arange(3)),
    )[0],
    {"w": L, "s": jnp.float32(0.7)},
    slow=True,
)
entry("fori", lambda p, x: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p[i]), x), L)

# Derivatives and numbers of other kinds.

entry(
    "gradient_of_every_row",
    lambda p, x: jax.vmap(jax.grad(lambda r: jnp.sum(jnp.sin(r @ p))))(x),
    W,
)


def adapted(p, b):
    def loss(w, x, y):
        return jnp.sum((jnp.tanh(x @ w) - y) ** 2)

    def after_a_step(x, y):
        return jnp.tanh(x @ (p - 0.1 * jax.grad(loss)(p, x, y))) - y

    return jax.vmap(after_a_step)(b["x"], b["y"])


entry("a_step_of_training_for_every_row", adapted, W, {"x": X, "y": draw(N, 3, seed=7)})
entry(
    "fourier_filter",
    lambda p, x: jnp.fft.irfft(
        jnp.fft.rfft(x, axis=1) * jax.lax.complex(p["r"], p["i"])[None], axis=1, n=T
    ),
    {"r": draw(3, F), "i": draw(3, F, seed=1)},
    XT,
)
entry(
    "keys_in_the_batch",
    lambda p, b: jax.vmap(lambda x, k: x @ p * jax.random.normal(k, (3,)))(b["x"], b["k"]),
    W,
    {"x": X, "k": jax.random.split(jax.random.key(0), N)},
)


# Losses that are no mean squares.

FUNCTIONS["weight_decay_and_weights_of_losses"] = (
    (
        lambda p, x: (
            means(dense(p, x)) * jnp.exp(p["s"]) + p["s"] + sum(jnp.sum(p[k] ** 2) for k in "wb")
        ),
        {**P, "s": jnp.float32(0.3)},
        X,
    ),
    False,
)
FUNCTIONS["cross_entropy"] = (
    (
        lambda p, b: (
            -jnp.take_along_axis(jax.nn.log_softmax(dense(p, b["x"])), b["y"][:, None] % 3, axis=1)[
                :, 0
            ]
        ),
        P,
        {"x": X, "y": PICKS},
    ),
    False,
)
FUNCTIONS["tokens_of_the_whole_batch_counted"] = (
    (
        lambda p, b: jnp.sum(jnp.sum(dense(p, b["x"]) ** 2, -1) * b["m"], 1) / jnp.sum(b["m"]),
        P,
        {"x": XT, "m": jnp.asarray(np.random.default_rng(0).integers(0, 2, (N, T)), jnp.float32)},
    ),
    False,
)
