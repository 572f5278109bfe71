"""jax_privacy: clipped gradients, all rows at once and row by row."""

from benchmarks._peers.harness import Method, report


def methods():
    from jax_privacy.clipping import clipped_grad

    from benchmarks._peers.in_jax import arrays

    def clipping(problem, **options):
        fn = clipped_grad(problem.sum_loss, l2_clip_norm=problem.max_norm, **options)
        return problem.compiled(lambda params, train, val: fn(params, train))

    def row_by_row(problem):
        return clipping(problem, microbatch_size=1)

    return {
        "jax_privacy, clipped_grad": Method("clipped gradient", clipping, arrays),
        "jax_privacy, row by row": Method("clipped gradient", row_by_row, arrays),
    }


if __name__ == "__main__":
    from benchmarks._peers.in_jax import probes, works

    report(["jax_privacy", "jax", "flax"], probes, works, methods)
