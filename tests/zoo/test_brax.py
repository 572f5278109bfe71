"""PPO of brax: rows are pieces of episodes [B, T], which its loss turns to [T, B]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ghostjax import value_grad_and_dots
from tests.zoo.checks import MARKS, check, direction_like, package, redrawn, rows_apart

pytestmark = MARKS
B, T, OBSERVED, ACTIONS = 3, 5, 4, 2


def ppo(**options):
    from brax.training import types
    from brax.training.agents.ppo import losses, networks

    network = networks.make_ppo_networks(
        OBSERVED, ACTIONS, policy_hidden_layer_sizes=(6,), value_hidden_layer_sizes=(6, 6)
    )
    keys = jax.random.split(jax.random.key(0))
    params = losses.PPONetworkParams(
        policy=network.policy_network.init(keys[0]), value=network.value_network.init(keys[1])
    )
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=(B, T, *shape)), jnp.float32)

    data = types.Transition(
        observation=draw(OBSERVED),
        action=draw(ACTIONS),
        reward=draw(),
        discount=jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32),
        next_observation=draw(OBSERVED),
        extras={
            "state_extras": {"truncation": jnp.zeros((B, T))},
            "policy_extras": {
                "raw_action": draw(ACTIONS),
                "log_prob": draw() - 3,
                "distribution_params": jnp.abs(draw(2 * ACTIONS)),
            },
        },
    )
    loss = functools.partial(
        losses.compute_ppo_loss, rng=jax.random.key(1), ppo_network=network, **options
    )
    return (lambda params, data: loss(params, None, data)[0]), redrawn(params), data


def test_brax():
    package("brax")
    # The bonus for entropy draws noise for the whole batch at once: a row alone has other noise.
    loss_fn, params, data = ppo(normalize_advantage=False, entropy_cost=0.0)
    check(loss_fn, params, data, rows_apart(data), np.ones(B))


def test_normalized_advantages_are_constants():
    """They couple rows, but no gradient goes through: every row has its share."""
    package("brax")
    loss_fn, params, data = ppo()
    direction = direction_like(params)
    result = value_grad_and_dots(loss_fn, loss_reduction="sum")(params, data, direction=direction)
    total = sum(
        jnp.vdot(grad, v)
        for grad, v in zip(jax.tree.leaves(result.grads), jax.tree.leaves(direction))
    )
    np.testing.assert_allclose(result.total().sum(), total, rtol=1e-5)
