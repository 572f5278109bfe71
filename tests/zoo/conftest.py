"""Code of others promotes dtypes and ranks, and warns, as it likes."""

import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_have_it():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
