"""ghostjax: dots by direction and by factors, squared norms, clipped gradients."""

from benchmarks._peers.harness import Method, report


def methods():
    import jax

    from benchmarks._peers.in_jax import arrays
    from ghostjax import (
        GradDotProdEngine,
        squared_norms,
        value_and_clipped_grad,
        value_grad_and_dots,
    )

    def direction_form(problem):
        def step(params, train, val):
            direction = jax.grad(problem.mean_loss)(params, val)
            result = value_grad_and_dots(problem.mean_loss)(params, train, direction=direction)
            return result.grads, result.total()

        return problem.compiled(step)

    def engine(problem):
        engine = GradDotProdEngine(problem.row_losses, val_batch_size=problem.val_rows)

        def step(params, train, val):
            result = engine(params, problem.batch)
            return result.grads, engine.aggregate(result.dots)

        return problem.compiled(step)

    def norms(problem):
        def step(params, train, val):
            of_leaves = squared_norms(problem.row_losses)(params, train)
            return sum(jax.tree.leaves(of_leaves))

        return problem.compiled(step)

    def clipping(problem):
        fn = value_and_clipped_grad(problem.sum_loss, problem.max_norm, loss_reduction="sum")
        return problem.compiled(lambda params, train, val: fn(params, train)[1])

    return {
        "value_grad_and_dots": Method("dots", direction_form, lambda out: arrays(out[1])),
        "GradDotProdEngine": Method("dots", engine, lambda out: arrays(out[1])),
        "squared_norms": Method("squared norms", norms, arrays),
        "value_and_clipped_grad": Method("clipped gradient", clipping, arrays),
    }


if __name__ == "__main__":
    from benchmarks._peers.in_jax import probes, works

    report(["ghostjax", "jax", "flax"], probes, works, methods)
