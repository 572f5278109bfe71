"""PPO in plain JAX: which transitions made the policy better on rollouts that it did not see?

    python -m examples.ppo --updates 20

A point on a line is pushed to the middle. Advantages are normalised over the batch, as constants,
so that every transition has a gradient of its own.
"""

import jax
import jax.numpy as jnp
import optax

from ghostjax import directions, value_and_dots_fn

ENVIRONMENTS, STEPS, DISCOUNT, CLIP = 32, 16, 0.9, 0.2


def move(state, action):  # position and speed, [environments]
    position, speed = state
    speed = 0.8 * speed + 0.1 * (2 * action - 1)
    position = jnp.clip(position + speed, -1, 1)
    return (position, speed), 1 - jnp.abs(position)


def policy(params, x):  # logits of the two actions, and the value
    h = jnp.tanh(x @ params["w"] + params["b"])
    return h @ params["actor"], (h @ params["critic"])[..., 0]


def rollout(params, key):
    """Transitions [STEPS * ENVIRONMENTS], and the mean reward."""
    first, key = jax.random.split(key)
    start = jax.random.uniform(first, (ENVIRONMENTS,), minval=-1), jnp.zeros(ENVIRONMENTS)

    def act(state, key):
        x = jnp.stack(state, -1)
        logits, _ = policy(params, x)
        action = jax.random.categorical(key, logits)
        after, reward = move(state, action)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), action[:, None], 1)[:, 0]
        return after, {"x": x, "action": action, "log_prob": log_prob, "reward": reward}

    _, seen = jax.lax.scan(act, start, jax.random.split(key, STEPS))
    _, returns = jax.lax.scan(
        lambda after, reward: (reward + DISCOUNT * after,) * 2,
        jnp.zeros(ENVIRONMENTS),
        seen["reward"],
        reverse=True,
    )
    _, value = jax.vmap(policy, (None, 0))(params, seen["x"])
    advantage = returns - value
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    batch = {**seen, "return": returns, "advantage": advantage}
    flat = {key: array.reshape(-1, *array.shape[2:]) for key, array in batch.items()}
    return flat, seen["reward"].mean()


def ppo_loss(params, batch):
    logits, value = policy(params, batch["x"])
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["action"][:, None], 1)[:, 0]
    ratio = jnp.exp(log_prob - batch["log_prob"])
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    surrogate = jnp.minimum(ratio * batch["advantage"], clipped * batch["advantage"])
    return jnp.mean(0.5 * jnp.square(value - batch["return"]) - surrogate)


def actor_loss(params, batch):
    logits, _ = policy(params, batch["x"])
    log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["action"][:, None], 1)[:, 0]
    return -jnp.mean(jnp.exp(log_prob - batch["log_prob"]) * batch["advantage"])


def main(updates: int = 20, seed: int = 0) -> dict[str, float]:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "w": jax.random.normal(keys[0], (2, 16)),
        "b": jnp.zeros((1, 16)),
        "actor": 0.1 * jax.random.normal(keys[1], (16, 2)),
        "critic": jnp.zeros((16, 1)),
    }
    optimizer = optax.sgd(0.3)

    @jax.jit
    def update(params, state, key):
        own, other = jax.random.split(key)
        batch, reward = rollout(params, own)
        held_out, _ = rollout(params, other)
        _, grads, dots = value_and_dots_fn(ppo_loss)(params, batch)
        val_loss, val_grads = jax.value_and_grad(actor_loss)(params, held_out)
        direction = directions.through_optimizer(optimizer, state, params, grads, val_grads)
        scores = dots.result(direction).total() / len(batch["action"])
        changes, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, changes)
        actual = val_loss - actor_loss(params, held_out)
        by_time = scores.reshape(STEPS, ENVIRONMENTS).sum(1)
        return params, state, reward, by_time, scores.sum(), actual

    state, rewards, values, predicted, actual = optimizer.init(params), [], 0, 0.0, 0.0
    for key in jax.random.split(keys[2], updates):
        params, state, reward, by_time, expected, found = update(params, state, key)
        rewards.append(float(reward))
        values, predicted = values + by_time, predicted + float(expected)
        actual += float(found)
    print("by time in the episode:", " ".join(f"{value:.3f}" for value in values))
    ends = {"reward_first": rewards[0], "reward_last": rewards[-1]}
    return {**ends, "predicted": predicted, "actual": actual}


if __name__ == "__main__":
    import tyro

    print(tyro.cli(main))
