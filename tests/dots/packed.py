"""A small decoder over packed documents, and the same documents apart."""

import jax
import jax.numpy as jnp
import numpy as np

B, T, D, HEADS, VOCABULARY, LAYERS = 3, 10, 8, 2, 11, 2
LENGTHS = [[5, 3], [6, 4], [2, 4, 2]]  # what is left of a row is padding
DOCUMENTS = sum(map(len, LENGTHS))


def parameters():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)

    return {
        "embedding": draw(VOCABULARY, D),
        "positions": draw(T, D),
        "layers": {
            "qkv": draw(LAYERS, D, 3 * D),
            "out": draw(LAYERS, D, D),
            "up": draw(LAYERS, D, 2 * D),
            "bias": draw(LAYERS, 2 * D),
            "down": draw(LAYERS, 2 * D, D),
            "scale": 1 + draw(LAYERS, D),
        },
        "scale": 1 + draw(D),
    }


def packed_batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCABULARY, (B, T))
    documents, positions = -np.ones((B, T), int), np.zeros((B, T), int)
    number = 0
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            documents[row, start : start + length] = number
            positions[row, start : start + length] = np.arange(length)
            number, start = number + 1, start + length
    arrays = {"tokens": tokens, "documents": documents, "positions": positions}
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def documents_apart(batch):
    """Batches of one document each."""
    for number in range(DOCUMENTS):
        own = np.asarray(batch["documents"]) == number
        yield {name: array[own][None] for name, array in batch.items()}


def norm(x, scale):
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + jnp.asarray(1e-6, x.dtype))
    return x * jnp.broadcast_to(scale, x.shape)


def rotated(x, positions):
    frequencies = jnp.geomspace(1.0, 0.1, x.shape[-1] // 2)
    angles = (positions[..., None].astype(jnp.float32) * frequencies[None, None])[:, :, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def layer(p, x, batch, *, flat):
    rows, length, _ = x.shape
    h = norm(x, p["scale"])
    h = h.reshape(-1, D) if flat else h
    qkv = (h @ p["qkv"]).reshape(rows, length, -1)
    q, k, v = (part.reshape(rows, length, HEADS, -1) for part in jnp.split(qkv, 3, axis=-1))
    q, k = (rotated(part, batch["positions"]) for part in (q, k))
    documents = batch["documents"]
    seen = documents[:, :, None] == documents[:, None, :]
    seen &= jnp.tril(jnp.ones((length, length), bool))[None]
    q, k, v = (part.astype(jnp.float32) for part in (q, k, v))
    h = jax.nn.dot_product_attention(q, k, v, mask=seen[:, None]).astype(x.dtype)
    x = x + h.reshape(rows, length, D) @ p["out"]
    h = norm(x, p["scale"]) @ p["up"]
    return x + jax.nn.gelu(h + jnp.broadcast_to(p["bias"], h.shape)) @ p["down"]


def token_losses(p, batch, *, scan=True, remat=True, flat=False):
    """[B, T - 1], zero where a document ends."""
    tokens, documents = batch["tokens"], batch["documents"]
    x = p["embedding"][tokens] + p["positions"][batch["positions"]]

    def body(x, own):
        return layer(own, x, batch, flat=flat), None

    body = jax.checkpoint(body) if remat else body
    if scan:
        x, _ = jax.lax.scan(body, x, p["layers"])
    else:
        for number in range(LAYERS):
            x, _ = body(x, jax.tree.map(lambda leaf, k=number: leaf[k], p["layers"]))
    logits = norm(x, p["scale"])[:, :-1] @ p["embedding"].T
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    is_same = (documents[:, 1:] == documents[:, :-1]) & (documents[:, 1:] >= 0)
    return jnp.where(is_same, losses[..., 0], 0.0)
