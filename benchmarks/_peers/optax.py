"""optax: a metric of every row's gradient by micro_grad, here its dot with the validation one."""

from benchmarks._peers.harness import Method, report


def methods():
    import jax
    import jax.numpy as jnp
    from optax.microbatching import micro_grad

    from benchmarks._peers.in_jax import arrays

    def dots(problem):
        def step(params, train, val):
            direction = jax.grad(problem.mean_loss)(params, val)

            def dot(grads):
                return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, grads, direction)))

            fn = micro_grad(problem.mean_loss, microbatch_size=1, metrics_fn=dot)
            total, aux = fn(params, train)
            return total, aux.metrics

        return problem.compiled(step)

    return {"optax, micro_grad": Method("dots", dots, lambda out: arrays(out[1]))}


if __name__ == "__main__":
    from benchmarks._peers.in_jax import probes, works

    report(["optax", "jax", "flax"], probes, works, methods)
