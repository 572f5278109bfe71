"""Where arrays are: the rule for parameters, and batches that cannot be divided."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from ghostjax.runs.config import TrainConfig
from ghostjax.runs.errors import UsageError
from ghostjax.runs.models import GPT, SIZES, Classifier
from ghostjax.runs.training.placement import check_params, make_placement

P = PartitionSpec


def placement_of(tmp_path, mesh, **options):
    return make_placement(TrainConfig(tmp_path, mesh=mesh, **options))


def specs(placement, model, example):
    shapes = jax.eval_shape(model.init, jax.random.key(0), example)["params"]
    return {
        jax.tree_util.keystr(path): placement.spec(jax.tree_util.keystr(path), leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }


def test_matrices_of_the_decoder_come_in_pairs(tmp_path):
    found = specs(
        placement_of(tmp_path, "data=4,model=2"), GPT(SIZES["micro"]), jnp.zeros((1, 2), int)
    )
    split = {name: spec for name, spec in found.items() if "model" in spec}
    blocks = "['blocks']"
    assert split == {
        f"{blocks}['qkv']['kernel']": P(None, None, "model"),
        f"{blocks}['qkv']['bias']": P(None, "model"),
        f"{blocks}['attention']['kernel']": P(None, "model"),
        f"{blocks}['up']['kernel']": P(None, None, "model"),
        f"{blocks}['up']['bias']": P(None, "model"),
        f"{blocks}['down']['kernel']": P(None, "model"),
        "['tokens']['embedding']": P("model"),
    }


def test_fsdp_takes_the_largest_axis_that_is_left(tmp_path):
    placement = placement_of(tmp_path, "data=4,model=2", fsdp=True)
    found = specs(placement, Classifier(SIZES["micro"], 10), jnp.zeros((1, 6)))
    assert found["['hidden_0']['dense']['kernel']"] == P(None, "model")  # 6 inputs
    assert found["['hidden_1']['dense']['kernel']"] == P("data", "model")
    assert found["['hidden_0']['norm']['scale']"] == P("data")
    assert found["['classes']['bias']"] == P("model")
    assert placement.spec("['own']", (3, 8, 16, 16)) == P(None, None, "data")
    assert placement.spec("['own']", ()) == placement.spec("['own']", (3, 0)) == P()


def test_state_is_where_its_parameters_are(tmp_path):
    placement = placement_of(tmp_path, "data=4,model=2", fsdp=True)
    params = {"up": {"kernel": jnp.ones((8, 6))}, "scale": jnp.ones(3)}
    place = placement.state(params)
    state = jax.jit(placement.optimizer(optax.adam(0.1)).init)(place)
    assert place["up"]["kernel"].sharding.spec == P("data", "model")
    assert state[0].mu["up"]["kernel"].sharding.spec == P("data", "model")
    assert state[0].count.sharding.is_fully_replicated
    assert placement.shapes(state)[0].nu["up"]["kernel"].sharding.spec == P("data", "model")


def test_rows_are_split_over_data(tmp_path):
    rows = np.arange(16.0).reshape(8, 2)
    placement = placement_of(tmp_path, "data=4,model=2")
    found = placement.rows({"x": rows})["x"]
    val_rows = placement.val_rows(rows.reshape(1, 2, 4, 2))  # in parts
    assert val_rows.sharding.is_fully_replicated
    assert (val_rows.reshape(8, 2) == rows).all()
    loss = jax.jit(placement.losses(lambda params, rows: rows.sum(1)))
    assert loss({}, val_rows.reshape(8, 2)).sharding.spec == P("data")
    assert (placement.own_rows(8) == np.arange(8)).all()
    assert {shard.data.shape for shard in found.addressable_shards} == {(2, 2)}
    assert (np.asarray(found) == rows).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 12},
            "--batch-size 12 cannot be divided over the 8 devices of data in --mesh "
            "data=8,model=1 (found 8 cpu devices): 8 and 16 can, or take --mesh data=4,model=1",
        ),
        ({"batch_size": 5}, "): 8 can, or take --mesh data=1,model=1"),
        ({"batch_size": 8, "microbatches": 2}, "8, in 2 parts, cannot be divided over the 8 de"),
        ({"val_batch_size": 24}, "--val-batch-size 24, in 2 parts, cannot be divided over the 8"),
        ({"val_batch_size": 24}, "16 and 32 can, or take --mesh data=4,model=1"),
        ({"mesh": "data=3"}, "--batch-size 16 cannot be divided over the 3 devices of data in"),
        ({"mesh": "data=16"}, "--mesh data=16,model=1 takes 16 devices, found 8 cpu devices: give"),
        ({"mesh": "model=16"}, "--mesh data=1,model=16 takes 16 devices, found 8 cpu devices"),
        ({"mesh": "model=2", "task": "a:b"}, "--mesh model=2 is for the built-in models"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, options, message):
    with pytest.raises(UsageError) as raised:
        make_placement(TrainConfig(tmp_path, **options))
    assert message in str(raised.value)


@pytest.mark.parametrize("mesh", ["4", "data=0", "data=2,rows=2", "data=2,data=2", "model=-1", ""])
def test_a_mesh_has_two_axes(tmp_path, mesh):
    with pytest.raises(UsageError, match=r"expected numbers of devices along data and model, such"):
        TrainConfig(tmp_path, mesh=mesh).check()


def test_a_model_that_is_not_divided_is_refused(tmp_path):
    placement = placement_of(tmp_path, "data=1,model=3")
    with pytest.raises(UsageError, match=r"--mesh model=3 divides no parameter of the model: \['u"):
        check_params(placement, {"up": {"kernel": jnp.ones((4, 4))}})
