"""Kernels and fused attention: dots of the parameters in and around them, or an error by name."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import pytest

from ghostjax import testing, value_grad_and_dots
from models.arrays import direction_like, draw
from tests.dots import kernels
from tests.dots.checks import check, check_late, expected_dots, one_by_one
from tests.dots.kernels import ACCUMULATING, PARAMS, B, F, T

NORMS = {
    "a row of positions a block": lambda: kernels.norm_of_positions(T),
    "part of a row a block": lambda: kernels.norm_of_positions(2),
    "two rows a block": lambda: kernels.norm_of_positions(8),
    "all rows in one block": lambda: kernels.norm_of_positions(12),
    "rows inside": kernels.norm_of_time_major,
    "vmap": kernels.norm_under_vmap,
    "vmap of positions": kernels.norm_under_vmap_of_positions,
    "scan, remat": kernels.norm_in_scanned_layers,
}


@pytest.mark.quick("two rows a block")
@pytest.mark.parametrize("name", NORMS)
def test_norms_with_a_scale(name):
    losses, params, x = NORMS[name]()
    result = check(losses, params, x)
    assert jax.tree.leaves(result.dots)[0].shape == (B,)


def test_norms_with_late_directions():
    check_late(*NORMS["two rows a block"]())


def accumulating_losses(params, x):
    y = ACCUMULATING((x @ params["w"]).reshape(-1, F), params["scale"])
    return jnp.sum(jnp.tanh(y).reshape(len(x), -1), 1)


def test_a_kernel_that_adds_up_over_the_grid_is_refused():
    """No row has a part in what the kernel gives the scale; ``per_example`` is the way out."""
    x, direction = draw(B, T, F, seed=1), direction_like(PARAMS)
    message = (
        r"in the backward rule of .*\(norm at .*pallas_call .*sums over rows .*writes one of its "
        r"outputs for several rows at once.*per_example=True"
    )
    with pytest.raises(ValueError, match=message):
        value_grad_and_dots(lambda p, x: jnp.mean(accumulating_losses(p, x)))(
            PARAMS, x, direction=direction
        )


def test_a_kernel_that_adds_up_over_the_grid_for_a_constant():
    """With a scale that is no parameter, what the kernel adds up goes nowhere."""

    def losses(params, x):
        return accumulating_losses(params | {"scale": PARAMS["scale"]}, x @ params["w"])

    check(losses, {"w": PARAMS["w"]}, draw(B, T, F, seed=1))


def test_a_kernel_that_adds_up_over_the_grid_per_example():
    x, direction = draw(B, T, F, seed=1), direction_like(PARAMS)

    def one(params, x):
        return accumulating_losses(params, x[None])[0]

    fn = jax.jit(value_grad_and_dots(one, per_example=True))
    dots = fn(PARAMS, x, direction=direction).dots
    norm = kernels.NORMS[T]

    def plain(params, x):
        y = norm((x @ params["w"]).reshape(-1, F), params["scale"])
        return jnp.sum(jnp.tanh(y).reshape(len(x), -1), 1)

    testing.assert_dots_close(dots, expected_dots(plain, PARAMS, x, direction))


def of_gpus(name):
    with warnings.catch_warnings():  # later versions name another package to take it from
        warnings.simplefilter("ignore", DeprecationWarning)
        return pytest.importorskip(f"jax.experimental.pallas.ops.gpu.{name}")


def rms_of_gpus(x, scale):
    """One kernel gives the cotangent of x, another one those of scale and bias, from all rows."""
    return of_gpus("rms_norm").rms_norm(x, scale, jnp.zeros(F), interpret=True)


@pytest.mark.slow
def test_a_norm_of_gpus_with_a_constant_scale(standard_promotion):
    def losses(params, x):
        return jnp.sum(jnp.tanh(rms_of_gpus(x @ params["w"], PARAMS["scale"])), (1, 2))

    check(losses, {"w": PARAMS["w"]}, draw(B, T, F, seed=1), exact_gradient=False)


@pytest.mark.slow
def test_a_norm_of_gpus_with_a_parameter(standard_promotion):
    def losses(params, x):
        return jnp.sum(jnp.tanh(rms_of_gpus(x @ params["w"], params["scale"])), (1, 2))

    x, direction = draw(B, T, F, seed=1), direction_like(PARAMS)
    with pytest.raises(ValueError, match=r"rms_norm.py:\d+\): pallas_call .*per_example=True"):
        value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x)))(PARAMS, x, direction=direction)

    def one(params, x):
        return losses(params, x[None])[0]

    dots = jax.jit(value_grad_and_dots(one, per_example=True))(PARAMS, x, direction=direction).dots
    testing.assert_dots_close(dots, one_by_one(losses, PARAMS, x, direction))


def attention_of_gpus(q, k, v):
    attention = of_gpus("attention")
    names = ("block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes = attention.BlockSizes(**dict.fromkeys(names, T))
    return attention.mha(q, k, v, None, interpret=True, block_sizes=sizes)


ATTENTION = {
    "heads merged with rows": (kernels.with_plain_backward(kernels.flash), True),
    "pallas.ops.gpu.attention": (attention_of_gpus, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_between_projections(name):
    attend, merged = ATTENTION[name]
    check(*kernels.attention_losses(attend, merged=merged))


def uncleared(q_ref, k_ref, v_ref, o_ref, top_ref, sum_ref, acc_ref, *, steps):
    """Adds up what rows before have left."""
    acc_ref[...] += jax.nn.softmax(q_ref[...] @ k_ref[...].T) @ v_ref[...]
    o_ref[...] = acc_ref[...]


def test_scratch_memory_that_is_not_cleared():
    attend = kernels.with_plain_backward(lambda *qkv: kernels.flash(*qkv, kernel=uncleared))
    losses, params, x = kernels.attention_losses(attend, merged=True)
    message = (
        r"pallas_call at .*kernels.py:\d+ may read from scratch memory what other rows have left"
        r".*ghostjax.rowwise .*per_example=True"
    )
    with pytest.raises(ValueError, match=message):
        value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x)))(
            params, x, direction=direction_like(params)
        )


def sizes_of_128(kind, without=(), **others):
    fields = [name for name in kind.__dataclass_fields__ if name.startswith("block_")]
    return kind(**(dict.fromkeys(set(fields) - set(without), 128) | others))


def flash_of_tpu():
    from jax.experimental.pallas import tpu as pltpu
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    sizes = sizes_of_128(flash.BlockSizes, block_b=1)

    def attend(q, k, v, ids):
        ids = flash.SegmentIds(ids, ids)
        return flash.flash_attention(q, k, v, segment_ids=ids, causal=True, block_sizes=sizes)

    return attend, pltpu.force_tpu_interpret_mode


def splash_of_tpu(*, fused):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    without = ("block_q_dq", "block_kv_dq") if fused else ()
    sizes = sizes_of_128(splash.BlockSizes, without, use_fused_bwd_kernel=fused)
    mask = splash.MultiHeadMask([splash.CausalMask((256, 256))])
    kernel = splash.make_splash_mha(
        mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=True
    )
    attend = jax.vmap(lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(ids, ids)))
    return attend, contextlib.nullcontext


OF_TPU = {
    "flash": flash_of_tpu,
    "splash": lambda: splash_of_tpu(fused=False),
    "splash, fused": lambda: splash_of_tpu(fused=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TPU)
def test_attention_of_tpus(name, standard_promotion):
    """Interpreted, in the smallest blocks there are, two of queries and of keys."""
    attend, interpreted = OF_TPU[name]()
    params = {name: draw(4, 1, 128, seed=k) / 3 for k, name in enumerate("qkv")}
    x, direction = draw(2, 256, 4, seed=5), direction_like(params)

    def losses(params, x):
        q, k, v = (jnp.einsum("bte,ehd->bhtd", x, params[name]) for name in "qkv")
        documents = (x[:, :, 0] > 0).astype(jnp.int32)
        return jnp.mean(jnp.sin(attend(q, k, v, documents)), (1, 2, 3))

    fn = value_grad_and_dots(lambda p, x: jnp.mean(losses(p, x)))
    with interpreted():
        dots = jax.jit(fn)(params, x, direction=direction).dots
        shares = one_by_one(losses, params, x, direction)
    testing.assert_dots_close(dots, shares)


@pytest.fixture
def cudnn(monkeypatch):
    """JAX asks for the library while it traces. Nothing but lowering needs it to be there."""
    module = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91400)
    monkeypatch.setattr(f"{module}.check_compute_capability", lambda _: True)


H, D = 2, 8
FUSED = {name: draw(F, H, D, seed=k).astype(jnp.bfloat16) for k, name in enumerate("qkv")}


def cudnn_loss(params, x, bias=None, implementation="cudnn", vmapped=False):
    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, bias, implementation=implementation)

    q, k, v = (jnp.einsum("bte,ehd->bthd", x, params[name]) for name in "qkv")
    if vmapped:
        q, k, v = (h[:, None] for h in (q, k, v))
    out = (jax.vmap(attend) if vmapped else attend)(q, k, v)
    return jnp.mean(jnp.square(out.astype(jnp.float32)))


@pytest.mark.parametrize("vmapped", [False, True])
def test_attention_by_cudnn(cudnn, standard_promotion, vmapped):
    """Traced and lowered for CUDA: the dots' program is that of the unfused attention."""
    x = draw(B, T, F, seed=1).astype(jnp.bfloat16)

    def lowered(implementation):
        def loss(params, x):
            return cudnn_loss(params, x, implementation=implementation, vmapped=vmapped)

        fn = jax.jit(value_grad_and_dots(loss))
        return fn.trace(FUSED, x, direction=FUSED)

    fused, plain = lowered("cudnn"), lowered("xla")
    assert jax.tree.map(jnp.shape, fused.out_info) == jax.tree.map(jnp.shape, plain.out_info)
    assert fused.out_info.dots["q"].shape == (B,)
    text = fused.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert text.count("__cudnn$fmhaSoftmax(") == 1


def test_attention_by_cudnn_with_a_bias_of_rows(cudnn, standard_promotion):
    x, bias = draw(B, T, F, seed=1).astype(jnp.bfloat16), draw(B, H, T, T).astype(jnp.bfloat16)
    loss = value_grad_and_dots(lambda p, batch: cudnn_loss(p, *batch))
    result = jax.eval_shape(lambda p, batch: loss(p, batch, direction=p), FUSED, (x, bias))
    assert result.dots["q"].shape == (B,)


def test_attention_by_cudnn_with_a_bias_that_is_a_parameter(cudnn, standard_promotion):
    """Its cotangent comes added up over rows."""
    params = FUSED | {"bias": jnp.zeros((1, H, T, T), jnp.bfloat16)}
    x = draw(B, T, F, seed=1).astype(jnp.bfloat16)
    fn = value_grad_and_dots(lambda p, x: cudnn_loss(p, x, p["bias"]))
    message = r"dot_product_attention_bwd_wrapper.* sums over rows .*per_example=True"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p, x: fn(p, x, direction=p), params, x)
