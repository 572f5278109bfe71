"""The table of models: every rule, every way a module is used, every transform, one row each.

A case builds ``(loss_fn, params, batch)`` for N rows, T positions and a compute dtype. Losses are
one number per row, averaged over positions.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

FEATURES = 8
VOCAB = 11
CASES: dict[str, Callable] = {}


def case(function: Callable) -> Callable:
    CASES[function.__name__] = function
    return function


def ids(rows, positions, salt=0):
    return np.random.default_rng(100 + salt).integers(0, VOCAB, (rows, positions), np.int32)


def activations(*shape):
    return np.random.default_rng(200).normal(size=shape).astype(np.float32)


def row_means(values):
    """[N, ...] -> [N] in float32."""
    return jnp.mean(values.astype(jnp.float32).reshape(values.shape[0], -1), axis=1)


def squared(outputs):
    return row_means(jnp.square(outputs.astype(jnp.float32) - 0.3))


def perturbed(model, inputs, **kwargs):
    """Random parameters of a sensible scale, none of them zero or one, so that no term hides."""
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, **kwargs), inputs)["params"]
    generator = np.random.default_rng(300)

    def draw(path, leaf):
        scale = 0.2 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
        centre = 1.0 if path[-1] == jax.tree_util.DictKey("scale") else 0.0
        return jnp.asarray(centre + scale * generator.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def regression(model, inputs, **kwargs):
    """Mean squared outputs of ``model`` on one array."""

    def loss_fn(params, batch):
        return squared(model.apply({"params": params}, batch, **kwargs))

    return loss_fn, perturbed(model, inputs, **kwargs), inputs


def language(model, rows, positions):
    """Next-token cross entropy of ``model`` on ids."""
    batch = {"ids": ids(rows, positions), "targets": ids(rows, positions, salt=1)}

    def loss_fn(params, batch):
        logits = model.apply({"params": params}, batch["ids"]).astype(jnp.float32)
        return row_means(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]))

    return loss_fn, perturbed(model, batch["ids"]), batch


class NormNet(nn.Module):
    """A norm between two Linear layers, twice."""

    norm: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Dense(FEATURES, dtype=self.dtype)(x)
            x = nn.gelu(self.norm(dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x)


def norm_case(name, norm, shape=lambda n, t: (n, t, FEATURES), model=NormNet):
    def build(rows, positions, dtype):
        return regression(model(norm, dtype), activations(*shape(rows, positions)))

    build.__name__ = name
    return case(build)


norm_case("layernorm_rank_2", nn.LayerNorm, lambda n, t: (n, FEATURES))
norm_case("layernorm_rank_3", nn.LayerNorm)
norm_case("layernorm_rank_4", nn.LayerNorm, lambda n, t: (n, t, 2, FEATURES))
norm_case("layernorm_no_bias", functools.partial(nn.LayerNorm, use_bias=False))
norm_case("layernorm_no_scale", functools.partial(nn.LayerNorm, use_scale=False))
norm_case("layernorm_epsilon", functools.partial(nn.LayerNorm, epsilon=0.1))
norm_case("layernorm_exact_variance", functools.partial(nn.LayerNorm, use_fast_variance=False))
norm_case("layernorm_two_reduced", functools.partial(nn.LayerNorm, reduction_axes=(-2, -1)))
norm_case(
    "layernorm_two_features",
    functools.partial(nn.LayerNorm, reduction_axes=(-2, -1), feature_axes=(-2, -1)),
)
norm_case(
    "layernorm_features_swapped",
    functools.partial(nn.LayerNorm, reduction_axes=(-2, -1), feature_axes=(-1, -2)),
)
norm_case("rmsnorm", nn.RMSNorm)
norm_case("groupnorm", functools.partial(nn.GroupNorm, num_groups=2))
norm_case("instancenorm", nn.InstanceNorm, lambda n, t: (n, t + 5, FEATURES))


@case
def layernorm_masked(rows, positions, dtype):
    class Masked(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = jnp.arange(FEATURES) < 5
            return nn.Dense(3, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x, mask=mask))

    return regression(Masked(), activations(rows, positions, FEATURES))


@case
def dense_general_axes(rows, positions, dtype):
    model = nn.Sequential(
        [
            nn.DenseGeneral((3, 4), dtype=dtype),
            nn.gelu,
            nn.DenseGeneral((5, 2), axis=(-1, -2), dtype=dtype),
        ]
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def dense_general_batch_dims(rows, positions, dtype):
    class PerPosition(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.moveaxis(x, 1, 0)  # positions in front: each has a kernel of its own
            return jnp.moveaxis(nn.DenseGeneral(3, batch_dims=(0,), dtype=dtype)(x), 0, 1)

    return regression(PerPosition(), activations(rows, positions, FEATURES))


@case
def einsum_heads(rows, positions, dtype):
    model = nn.Sequential(
        [
            nn.Einsum((2, FEATURES, 4), "btd,hdk->bhtk", dtype=dtype),
            nn.gelu,
            nn.Einsum((2, 4, 3), "bhtk,hko->bto", use_bias=False, dtype=dtype),
        ]
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def einsum_ellipsis_and_batch_letter(rows, positions, dtype):
    model = nn.Sequential(
        [
            nn.Einsum((FEATURES, 2, 4), "...d,dhk->...hk", dtype=dtype),
            nn.gelu,
            nn.Einsum((2, 4, 3), "...hk,hko->...ho", dtype=dtype),
        ]
    )
    return regression(model, activations(rows, positions, FEATURES))


class TiedHead(nn.Module):
    """Embed, a block, and the same table again as output head."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, FEATURES, dtype=self.dtype)
        x = embed(tokens)
        x = x + nn.Dense(FEATURES, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))
        return embed.attend(x)


@case
def tied_head(rows, positions, dtype):
    return language(TiedHead(dtype), rows, positions)


@case
def embed_and_head(rows, positions, dtype):
    model = nn.Sequential([nn.Embed(VOCAB, FEATURES, dtype=dtype), nn.Dense(VOCAB, dtype=dtype)])
    return language(model, rows, positions)


@case
def embed_of_rank_one(rows, positions, dtype):
    table = nn.Embed(VOCAB, FEATURES, dtype=dtype)

    def loss_fn(params, batch):
        return squared(table.apply({"params": params}, batch))

    batch = ids(rows, 1)[:, 0]
    return loss_fn, perturbed(table, batch), batch


@case
def embed_out_of_range(rows, positions, dtype):
    table = nn.Embed(VOCAB, FEATURES, dtype=dtype)

    def loss_fn(params, batch):
        return squared(jnp.nan_to_num(table.apply({"params": params}, batch)))

    batch = ids(rows, positions) * 2 - 4  # negative ids count from the end; too large: no gradient
    return loss_fn, perturbed(table, batch), batch


@case
def convolutions(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), strides=2, dtype=dtype)(x)
            x = nn.gelu(nn.GroupNorm(2, dtype=dtype)(x))
            x = nn.Conv(8, (3, 3), feature_group_count=4, dtype=dtype)(x)
            x = nn.ConvTranspose(4, (2, 2), strides=(2, 2), dtype=dtype)(nn.gelu(x))
            return nn.Dense(3, dtype=dtype)(x.mean((1, 2)))

    return regression(Net(), activations(rows, 6, 6, 3))


@case
def attention(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
            return nn.MultiHeadDotProductAttention(2, normalize_qk=True, dtype=dtype)(x, mask=mask)

    return regression(Net(), activations(rows, positions, FEATURES))


def recurrent_case(name, cell):
    def build(rows, positions, dtype):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.RNN(cell(6, dtype=dtype))(x)
                return nn.Dense(3, dtype=dtype)(nn.LayerNorm(dtype=dtype)(x))

        return regression(Net(), activations(rows, positions, FEATURES))

    build.__name__ = name
    return case(build)


recurrent_case("lstm", nn.LSTMCell)
recurrent_case("optimized_lstm", nn.OptimizedLSTMCell)
recurrent_case("gru", nn.GRUCell)


@case
def bidirectional(rows, positions, dtype):
    model = nn.Bidirectional(
        nn.RNN(nn.GRUCell(5, dtype=dtype)), nn.RNN(nn.OptimizedLSTMCell(4, dtype=dtype))
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def recurrent_time_major(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.swapaxes(x, 0, 1)
            x = nn.RNN(nn.GRUCell(6, dtype=dtype), time_major=True)(x)
            x = nn.LayerNorm(dtype=dtype)(nn.Dense(FEATURES, dtype=dtype)(x))
            return jnp.swapaxes(x, 0, 1)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def shared_three_times(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(FEATURES, dtype=dtype)
            norm = nn.LayerNorm(dtype=dtype)
            conv = nn.Conv(FEATURES, (3,), dtype=dtype)
            for _ in range(3):
                x = x + conv(nn.gelu(dense(norm(x))))
            return x

    return regression(Net(), activations(rows, positions, FEATURES))


class Block(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(dtype=self.dtype)(x)
        h = nn.Dense(FEATURES, dtype=self.dtype)(nn.gelu(nn.Dense(12, dtype=self.dtype)(h)))
        return x + h, None


def layers_case(name, wrap, length=3, axis=0):
    def build(rows, positions, dtype):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(FEATURES, dtype=dtype)(x)
                stack = nn.scan(
                    wrap(Block),
                    variable_axes={"params": axis},
                    split_rngs={"params": True},
                    length=length,
                )
                x, _ = stack(dtype)(x, None)
                return nn.LayerNorm(dtype=dtype)(x)

        return regression(Net(), activations(rows, positions, FEATURES))

    build.__name__ = name
    return case(build)


layers_case("scan_over_layers", lambda block: block)
layers_case("scan_over_layers_axis_1", lambda block: block, axis=1)
layers_case("scan_of_remat", nn.remat)


@case
def scan_with_shared_weights(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Block, variable_broadcast="params", split_rngs={"params": False}, length=3
            )
            return stack(dtype)(x, None)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def scan_with_shared_weights_inside_scan_over_layers(rows, positions, dtype):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.RNN(nn.GRUCell(FEATURES, dtype=dtype))(x)
            return nn.LayerNorm(dtype=dtype)(h).astype(x.dtype), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(
                Recurrent, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return stack()(x, None)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def scan_of_tied_table(rows, positions, dtype):
    class Level(nn.Module):
        @nn.compact
        def __call__(self, x, tokens):
            embed = nn.Embed(VOCAB, FEATURES, dtype=dtype)
            x = nn.LayerNorm(dtype=dtype)(x + embed(tokens))
            return x, embed.attend(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            stack = nn.scan(
                Level,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=2,
            )
            x = jnp.zeros((*tokens.shape, FEATURES), dtype)
            return stack()(x, tokens)[1].sum(0)

    return language(Net(), rows, positions)


@case
def remat(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x, _ = nn.remat(Block)(dtype)(x)
            return x

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def vmap_ensemble(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                out_axes=1,
                axis_size=3,
            )
            return members(dtype)(x)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def vmap_over_positions_with_shared_weights(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            shared = nn.vmap(
                Block,
                variable_axes={"params": None},
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )
            return shared(dtype)(x)[0]

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def time_major_layers(rows, positions, dtype):
    """The leading axis is not the rows, though it may have their number."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = jnp.swapaxes(x, 0, 1)
            x = nn.LayerNorm(dtype=dtype)(nn.Dense(FEATURES, dtype=dtype)(x))
            x = nn.Einsum((FEATURES, 4), "tbd,dk->kbt", dtype=dtype)(nn.gelu(x))
            return jnp.moveaxis(x, 1, 0)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def own_module(rows, positions, dtype):
    """Parameters of several shapes, a helper method, two outputs, a child without parameters."""

    class Own(nn.Module):
        def setup(self):
            self.gain = self.param("gain", nn.initializers.ones, (FEATURES,))
            self.mix = self.param("mix", nn.initializers.normal(), (FEATURES, FEATURES))
            self.dropout = nn.Dropout(0.5, deterministic=True)

        def scaled(self, x):
            return x * self.gain.astype(x.dtype)[None, None]

        def __call__(self, x):
            x = self.dropout(self.scaled(x))
            return jnp.sin(x @ self.mix.astype(x.dtype)), x

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y, x = Own()(nn.Dense(FEATURES, dtype=dtype)(x))
            return nn.Dense(3, dtype=dtype)(x + y)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def own_module_with_custom_vjp(rows, positions, dtype):
    @jax.custom_vjp
    def straight_through(x, kernel):
        return x @ jnp.round(kernel * 8) / 8

    def forward(x, kernel):
        return straight_through(x, kernel), (x, kernel)

    def backward(residuals, cotangent):
        x, kernel = residuals
        return cotangent @ kernel.T, jnp.einsum("...i,...o->io", x, cotangent)

    straight_through.defvjp(forward, backward)

    class Quantised(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.normal(), (FEATURES, 4))
            return straight_through(x.astype(dtype), kernel.astype(dtype))

    model = nn.Sequential([nn.Dense(FEATURES, dtype=dtype), Quantised(), nn.Dense(2, dtype=dtype)])
    return regression(model, activations(rows, positions, FEATURES))


@case
def batchnorm_in_evaluation(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(FEATURES, dtype=dtype)(x)
            return nn.BatchNorm(use_running_average=True, dtype=dtype)(x)

    inputs = activations(rows, positions, FEATURES)
    statistics = {"mean": jnp.linspace(-1, 1, FEATURES), "var": jnp.linspace(0.5, 2, FEATURES)}

    def loss_fn(params, batch):
        state = {"params": params, "batch_stats": {"BatchNorm_0": statistics}}
        return squared(Net().apply(state, batch))

    return loss_fn, perturbed(Net(), inputs), inputs


@case
def two_models(rows, positions, dtype):
    """Module paths collide; parameter paths do not."""
    encoder, decoder = nn.Dense(FEATURES, dtype=dtype), nn.Dense(FEATURES, dtype=dtype)
    inputs = activations(rows, positions, FEATURES)
    params = {"encoder": perturbed(encoder, inputs), "decoder": perturbed(decoder, inputs)}

    def loss_fn(params, batch):
        hidden = nn.gelu(encoder.apply({"params": params["encoder"]}, batch))
        return squared(decoder.apply({"params": params["decoder"]}, hidden))

    return loss_fn, params, inputs


@case
def partitioned_parameters(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
            x = nn.Dense(FEATURES, kernel_init=init, dtype=dtype)(x)
            return nn.LayerNorm(dtype=dtype)(x)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def jitted_apply(rows, positions, dtype):
    """A jitted function inside the loss, called twice, is traced once and cached."""
    model = NormNet(nn.LayerNorm, dtype)
    apply = jax.jit(lambda params, x: model.apply({"params": params}, x))
    inputs = activations(rows, positions, FEATURES)

    def loss_fn(params, batch):
        return squared(apply(params, batch) + apply(params, -batch))

    return loss_fn, perturbed(model, inputs), inputs


@case
def unused_parameter(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(2, name="unused", dtype=dtype)(x)
            return nn.Dense(3, dtype=dtype)(x)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def nn_jit(rows, positions, dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x, _ = nn.jit(Block)(dtype)(x)
            return x

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def remat_scan(rows, positions, dtype):
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(dtype)(x)[0]

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat_scan(Plain, lengths=(2, 2))()(x)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def branches(rows, positions, dtype):
    """One branch runs; the parameters of the other get zeros."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            left, right = nn.Dense(FEATURES, dtype=dtype), nn.Dense(FEATURES, dtype=dtype)
            if self.is_initializing():
                return left(x) + right(x)
            x = nn.cond(x.sum() > -1e9, lambda m, x: left(x), lambda m, x: right(x), self, x)
            return nn.cond(x.sum() > -1e9, lambda m, x: left(x), lambda m, x: right(x), self, x)

    return regression(Net(), activations(rows, positions, FEATURES))


@case
def positions_in_a_module_of_their_own(rows, positions, dtype):
    """A table looked up without rows, added to rows in a module that owns nothing else."""

    class AddPositions(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = nn.Embed(16, FEATURES, dtype=dtype)(jnp.arange(x.shape[1]))
            return x + table[None]

    model = nn.Sequential(
        [nn.Dense(FEATURES, dtype=dtype), AddPositions(), nn.Dense(3, dtype=dtype)]
    )
    return regression(model, activations(rows, positions, FEATURES))


@case
def stopped_gradient(rows, positions, dtype):
    """The same parameters once as they are and once as a constant target."""
    model = NormNet(nn.LayerNorm, dtype)
    inputs = activations(rows, positions, FEATURES)

    def loss_fn(params, batch):
        target = model.apply({"params": jax.lax.stop_gradient(params)}, -batch)
        return squared(model.apply({"params": params}, batch) - target)

    return loss_fn, perturbed(model, inputs), inputs
