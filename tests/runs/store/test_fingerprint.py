import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ghostjax.runs.store.fingerprint import fingerprint

TREE = {"a": np.float32([1, 2]), "b": [np.int32(3), np.zeros((2, 1), jnp.bfloat16)]}


@pytest.mark.parametrize(
    "other",
    [
        {"a": np.float32([1, 2])},
        TREE | {"a": np.float32([2, 1])},
        TREE | {"a": np.float32([[1, 2]])},
        TREE | {"a": np.float32([1, 2]).view(np.int32)},
        TREE | {"b": TREE["b"][::-1]},
        TREE | {"b": [np.int32(3), -TREE["b"][1]]},
    ],
)
def test_fingerprints_differ_where_leaves_do(other):
    assert fingerprint(TREE) == fingerprint(jax.tree.map(jnp.asarray, TREE))
    assert fingerprint(TREE) != fingerprint(other)


def test_fingerprints_of_texts():
    found = [["ab"], [b"ab"], ["a", "b"], ["b", "a"], ["a\ud800"], []]
    assert len({fingerprint(texts) for texts in found}) == len(found)
    assert fingerprint(["ab"]) == fingerprint(("ab",))
    with pytest.raises(TypeError, match="no fingerprint of a object"):
        fingerprint([object()])
