"""kfac-jax: no figure of single rows; the mean squared norm, as the trace of its diagonal Fisher.

The empirical Fisher's diagonal is exact where a layer is used at one position a row; its blocks
for other layers and uses are approximations by design, and have no diagonal to sum.
"""

from benchmarks._peers.harness import Method, report


def methods():
    import jax
    import kfac_jax

    from benchmarks._peers.in_jax import arrays

    blocks = {
        "dense": kfac_jax.DenseDiagonal,
        "conv2d": kfac_jax.Conv2DDiagonal,
        "scale_and_shift": kfac_jax.ScaleAndShiftDiagonal,
    }

    def trace(problem):
        def registered(params, batch):
            losses = problem.row_losses(params, batch)[:, None]
            # A squared error whose derivative by each row's loss is one.
            kfac_jax.register_squared_error_loss(losses, jax.lax.stop_gradient(losses) - 0.5)
            return losses.mean()

        estimator = kfac_jax.BlockDiagonalCurvature(registered, layer_tag_to_block_ctor=blocks)
        args = (problem.params, problem.train)
        estimator.finalize(args)
        others = {type(block).__name__ for block in estimator.blocks} - {
            kind.__name__ for kind in blocks.values()
        }
        if others:
            raise NotImplementedError(f"no exact diagonal: {', '.join(sorted(others))}")

        def step(params, train, val):
            key = jax.random.key(0)
            state = estimator.init(key, (params, train), None, None, cache_eigenvalues=False)
            state = estimator.update_curvature_matrix_estimate(
                state, 0.0, 1.0, 0.0, problem.train_rows, key, (params, train), "fisher_empirical"
            )
            diagonals = [
                factor.value for block in state.blocks_states for factor in block.diagonal_factors
            ]
            # Registered losses count as divided by the rows; the blocks take a mean besides.
            return problem.train_rows * sum(leaf.sum() for leaf in diagonals)

        return problem.compiled(step)

    return {"kfac-jax, diagonal Fisher": Method("mean squared norm", trace, arrays)}


if __name__ == "__main__":
    from benchmarks._peers.in_jax import probes, works

    report(["kfac_jax", "jax", "flax"], probes, works, methods)
