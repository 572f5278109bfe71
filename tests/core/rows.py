"""Arrays of B rows, and what changes when one row does."""

import jax.numpy as jnp
import numpy as np

from ghostjax.core.places import split_rows

B = 4


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def counts(shape, high, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.int32)


X2, X3, X4 = draw((B, 6)), draw((B, B, 6)), draw((B, 2 * B, 2, 3))  # T == B and T == 2 B
T3 = draw((B, 5, 6))
SQUARE, IMAGE = draw((B, 3, 3)), draw((B, 8, 8, 3))
WORDS, SPOTS = counts((B, B), B), counts((B,), 5)


def merged(x):
    """[B, T, d] -> [B * T, d]."""
    return x.reshape(-1, x.shape[-1])


def redrawn(inputs, row):
    """The inputs with another row in the place of one."""
    rng = np.random.default_rng(100 + row)
    changed = []
    for x in inputs:
        x = np.array(x)
        if np.issubdtype(x.dtype, np.floating):
            x[row] = rng.standard_normal(x[row].shape)
        else:
            x[row] = (x[row] + rng.integers(1, 3, x[row].shape)) % (x.max() + 1)
        changed.append(x)
    return changed


def assert_only(row, info, before, after):
    """Entries of other rows are the same to the bit."""
    kept = [r for r in range(B) if r != row]
    before, after = (np.asarray(split_rows(jnp.asarray(v), info, B)) for v in (before, after))
    np.testing.assert_array_equal(before[kept], after[kept])
    return not np.array_equal(before[row], after[row], equal_nan=before.dtype.kind in "fc")
