"""Programs whose rows do not stay in place: loops over rows, shuffles, look-ups, padding.

Each is (loss(params, x), row_losses(params, x) -> [B]).
"""

import jax
import jax.numpy as jnp

from models.arrays import draw

B, T, F, H = 6, 4, 5, 3
PARAMS = {"w": draw(F, H), "b": draw(H), "v": draw(H, F, seed=4)}
X = draw(B, T, F, seed=1)


def hidden(p, x):
    return jnp.tanh(x @ p["w"] + jnp.broadcast_to(p["b"], (*x.shape[:-1], H)))


def rows(p, x):
    return jnp.mean(jnp.square(hidden(p, x) @ p["v"]), axis=(-2, -1))


def places(x):
    """Of every row a position, which the row says."""
    return jnp.abs(x[:, 0, 0] * 10).astype(jnp.int32) % T


def micro_batches(p, x):
    def body(total, part):
        return total + jnp.sum(rows(p, part)), None

    return jax.lax.scan(body, 0.0, x.reshape(3, 2, T, F))[0] / B


def every_third(p, x):
    def body(total, part):
        return total + jnp.sum(rows(p, part)), rows(p, part)

    total, losses = jax.lax.scan(body, 0.0, x.reshape(2, 3, T, F).swapaxes(0, 1))
    return (total + jnp.sum(losses)) / (2 * B)


def row_by_row(p, x):
    return jax.lax.scan(lambda total, row: (total + rows(p, row), None), 0.0, x)[0] / B


def by_index(p, x):
    return jax.lax.fori_loop(0, B, lambda i, total: total + rows(p, x[i]), 0.0) / B


def python_loop(p, x):
    total = 0.0
    for i in range(B):
        total = total + rows(p, x[i])
    return total / B


def chunked_outputs(p, x):
    h, targets = hidden(p, x).reshape(8, 3, H), x.reshape(8, 3, F)

    @jax.checkpoint
    def body(total, each):
        h, target = each
        return total + jnp.sum(jnp.square(h @ p["v"] - target)), None

    return jax.lax.scan(body, 0.0, (h, targets))[0] / (B * T * F)


def there_and_back(p, x):
    order = jnp.argsort(x[:, 0, 0])
    h = (hidden(p, x)[order] @ p["v"])[jnp.argsort(order)]
    return jnp.mean(jnp.square(h + x))


def sorted_tokens(p, x):
    tokens = x.reshape(B * T, F)
    order = jnp.argsort(jnp.abs(tokens[:, 0] * 10).astype(jnp.int32) % 3)
    h = hidden(p, tokens[order]) @ p["v"]
    back = jnp.zeros_like(tokens).at[order].set(h).reshape(B, T, F)
    return jnp.mean(jnp.square((back + x) @ p["w"]))


def looked_up(p, x):
    scores = (hidden(p, x)[jnp.arange(B), places(x)] @ p["v"])[:, 0]
    return -jnp.mean(jax.nn.log_sigmoid(scores * x[:, 1, 1]))


def looked_up_rows(p, x):
    h = jnp.take_along_axis(hidden(p, x), places(x)[:, None, None], axis=1)[:, 0]
    return -jax.nn.log_sigmoid((h @ p["v"])[:, 0] * x[:, 1, 1])


def turned_within_rows(p, x):
    """Numbers stay short where parts of the same rows are joined along another axis."""
    h = hidden(p, x[jnp.argsort(x[:, 0, 0])])
    h = jnp.concatenate([h[:, 1:], h[:, :1]], axis=1) @ p["v"]
    return jnp.mean(jnp.square(jnp.sum(h[:, :2], axis=1) @ p["w"]))


def turned_rows(p, x):
    h = jnp.roll(hidden(p, x), -1, axis=1) @ p["v"]
    return jnp.mean(jnp.square(jnp.sum(h[:, :2], axis=1) @ p["w"]), axis=1)


def written(p, x):
    h = hidden(p, x)
    h = h.at[jnp.arange(B), places(x)].set(0.5 * h[:, 0])
    return jnp.mean(jnp.square(h @ p["v"]))


def written_rows(p, x):
    h = hidden(p, x)
    here = jax.nn.one_hot(places(x), T)[:, :, None]
    return jnp.mean(jnp.square((h * (1 - here) + here * 0.5 * h[:, :1]) @ p["v"]), axis=(1, 2))


def padded(p, x):
    padded = jnp.pad(x, ((0, 2), (0, 0), (0, 0)))
    return jnp.sum(jnp.where(jnp.arange(B + 2) < B, rows(p, padded), 0.0)) / B


@jax.checkpoint
def reversed_and_rematerialised(p, x):
    return jnp.mean(rows(p, jax.lax.cond(x[0, 0, 0] > 9, jnp.flip, lambda x: x[::-1], x)))


def rolled_in_a_carry(p, x):
    def layer(x, _):
        return jnp.roll(jnp.tanh(hidden(p, x) @ p["v"]), 1, axis=0), None

    return jnp.mean(jnp.square(jax.lax.scan(layer, x, None, length=2)[0]))


def rolled_rows(p, x):
    for _ in range(2):
        x = jnp.tanh(hidden(p, x) @ p["v"])
    return jnp.mean(jnp.square(x), axis=(1, 2))


def recurrent(p, x):
    """Carries start as constants."""

    def cell(state, each):
        state = jnp.tanh(state @ p["v"] @ p["w"] + each @ p["w"])
        return state, jnp.mean(jnp.square(state @ p["v"]), axis=-1)

    start = jnp.full((len(x), H), 0.3)
    return jnp.mean(jax.lax.scan(cell, start, x.swapaxes(0, 1))[1], axis=0)


def started_by_parameters(p, x, order=None):
    """Carries start as parameters, which belong to those whose rows they are combined with."""

    def cell(state, each):
        state = jnp.tanh(state @ p["v"] @ p["w"] + each @ p["w"])
        losses = jnp.mean(jnp.square(state @ p["v"]), axis=-1)
        return state if order is None else state[order], losses

    start = jnp.broadcast_to(p["b"], (len(x), H))
    return jnp.mean(jax.lax.scan(cell, start, x.swapaxes(0, 1))[1], axis=0)


def started_and_dropped(p, x):
    """No rows are combined with what the loop starts from."""
    xs = hidden(p, x[jnp.argsort(x[:, 0, 0])]).swapaxes(0, 1)
    start = jnp.broadcast_to(p["b"], (len(x), H))
    return jnp.mean(jax.lax.scan(lambda state, each: (jnp.roll(each, 1, 0), state), start, xs)[1])


def joined_by_zeros(p, x):
    """Which belong to the rows that have them."""
    h = hidden(p, x)
    wide = jnp.zeros((len(x), T + 3, H))
    wholes = [
        jnp.pad(h, ((0, 0), (1, 2), (0, 0))),
        jax.lax.dynamic_update_slice(wide, h, (0, 1, 0)),
        wide.at[:, 2 : T + 2].set(h),
        wide.at[:, 1].add(h[:, 0]),
        jnp.concatenate([h, wide[:, :3]], axis=1),
    ]
    losses = [jnp.square(jnp.tanh(h @ p["v"] + p["v"][:1][None])) for h in wholes]
    return jnp.mean(sum(losses), axis=(1, 2))


def summed_so_far(p, x):
    return rows(p, jax.lax.associative_scan(jnp.add, x @ p["w"] @ p["v"], axis=1))


def with_a_token_of_parameters(p, x):
    def body(row):
        tokens = jnp.concatenate([p["v"][:1], row]).at[1].set(p["v"][1])
        return rows(p, tokens)

    return jnp.mean(jax.lax.map(body, x))


def with_a_token_of_parameters_rows(p, x):
    first, second = (jnp.broadcast_to(p["v"][k], (len(x), 1, F)) for k in (0, 1))
    return rows(p, jnp.concatenate([first, second, x[:, 1:]], axis=1))


def experts(p, x):
    tokens = x.reshape(B * T, F)
    kinds = jnp.abs(tokens[:, 0] * 10).astype(jnp.int32) % 3
    order = jnp.argsort(kinds)
    weights = jnp.stack([p["w"], 2 * p["w"], -p["w"]])
    h = jax.lax.ragged_dot(tokens[order], weights, jnp.bincount(kinds, length=3))
    h = jnp.zeros((B * T, H)).at[order].set(h).reshape(B, T, H)
    return jnp.mean(jnp.square(jnp.tanh(h + p["b"][None, None]) @ p["v"] + x))


def experts_rows(p, x):
    kinds = jnp.abs(x[..., 0] * 10).astype(jnp.int32) % 3
    weights = jnp.stack([p["w"], 2 * p["w"], -p["w"]])[kinds]
    h = jnp.tanh(jnp.einsum("btf,btfh->bth", x, weights) + p["b"][None, None])
    return jnp.mean(jnp.square(h @ p["v"] + x), axis=(1, 2))


CASES = {
    "micro_batches": (micro_batches, rows),
    "every_third": (every_third, rows),
    "map": (lambda p, x: jnp.mean(jax.lax.map(lambda row: rows(p, row), x)), rows),
    "map_in_batches": (
        lambda p, x: jnp.mean(jax.lax.map(lambda row: rows(p, row), x, batch_size=4)),
        rows,
    ),
    "row_by_row": (row_by_row, rows),
    "by_index": (by_index, rows),
    "python_loop": (python_loop, rows),
    "python_list": (
        lambda p, x: jnp.mean(jnp.stack([rows(p, x[i]) for i in range(B)])),
        rows,
    ),
    "python_chunks": (
        lambda p, x: sum(jnp.sum(rows(p, x[i : i + 2])) for i in range(0, B, 2)) / B,
        rows,
    ),
    "split": (
        lambda p, x: jnp.mean(jnp.concatenate([rows(p, part) for part in jnp.split(x, 3)])),
        rows,
    ),
    "strided": (lambda p, x: sum(jnp.sum(rows(p, x[k::3])) for k in range(3)) / B, rows),
    "chunked_outputs": (
        chunked_outputs,
        lambda p, x: jnp.mean(jnp.square(hidden(p, x) @ p["v"] - x), axis=(1, 2)),
    ),
    "shuffled": (
        lambda p, x: jnp.mean(rows(p, jax.random.permutation(jax.random.key(0), x))),
        rows,
    ),
    "there_and_back": (
        there_and_back,
        lambda p, x: jnp.mean(jnp.square(hidden(p, x) @ p["v"] + x), axis=(1, 2)),
    ),
    "sorted_tokens": (
        sorted_tokens,
        lambda p, x: jnp.mean(jnp.square((hidden(p, x) @ p["v"] + x) @ p["w"]), axis=(1, 2)),
    ),
    "looked_up": (looked_up, looked_up_rows),
    "turned_within_rows": (turned_within_rows, turned_rows),
    "written": (written, written_rows),
    "rolled": (lambda p, x: jnp.mean(rows(p, jnp.roll(x, 2, axis=0))), rows),
    "reversed_with_itself": (
        lambda p, x: jnp.mean(rows(p, x[::-1])) + jnp.mean(rows(p, x)),
        lambda p, x: 2 * rows(p, x),
    ),
    "padded": (padded, rows),
    "reversed_and_rematerialised": (reversed_and_rematerialised, rows),
    "rolled_in_a_carry": (rolled_in_a_carry, rolled_rows),
    "recurrent": (lambda p, x: jnp.mean(recurrent(p, x[jnp.argsort(x[:, 0, 0])])), recurrent),
    "started_by_parameters": (
        lambda p, x: jnp.mean(started_by_parameters(p, x[jnp.argsort(x[:, 0, 0])])),
        started_by_parameters,
    ),
    "started_by_parameters_reversed": (
        lambda p, x: jnp.mean(started_by_parameters(p, x[::-1])),
        started_by_parameters,
    ),
    "joined_by_zeros": (
        lambda p, x: jnp.mean(joined_by_zeros(p, x[jnp.argsort(x[:, 0, 0])])),
        joined_by_zeros,
    ),
    "summed_so_far": (  # of slices, one of which is empty
        lambda p, x: jnp.mean(summed_so_far(p, x[jnp.argsort(x[:, 0, 0])])),
        summed_so_far,
    ),
    "weighted_sum": (lambda p, x: jnp.dot(jnp.full(B, 1 / B), rows(p, x[::-1])), rows),
    "time_first_cut_across": (
        lambda p, x: jnp.mean(rows(p, x.swapaxes(0, 1).reshape(3, 8, F).reshape(T, B, F))),
        rows,
    ),
    "with_a_token_of_parameters": (with_a_token_of_parameters, with_a_token_of_parameters_rows),
    "experts": (experts, experts_rows),
}
