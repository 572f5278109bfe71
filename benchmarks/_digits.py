"""The digits of scikit-learn, wrong labels for them, and a small network with LayerNorm."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

try:
    from sklearn.datasets import load_digits
    from sklearn.metrics import roc_auc_score as roc_auc_score
except ImportError as error:
    raise ImportError("this benchmark needs scikit-learn: pip install 'ghostjax[bench]'") from error

CLASSES = 10
TEST_ROWS = 500


class Rows(NamedTuple):
    """images [..., n, 64] in [0, 1], labels [..., n]."""

    images: Any
    labels: Any

    def __getitem__(self, places):
        return Rows(self.images[places], self.labels[places])


class Data(NamedTuple):
    """Rows that no two of the three sets share."""

    train: Rows
    val: Rows
    test: Rows
    is_wrong: Any  # bool, of every training row: its label was changed


def draw(seed: int, val_rows: int, wrong_share: float = 0.0) -> Data:
    """A random split; a wrong label is any of the nine others. Validation and test are clean."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    test, val, train = np.split(order, [TEST_ROWS, TEST_ROWS + val_rows])
    is_wrong = np.zeros(len(train), bool)
    count = round(wrong_share * len(train))
    is_wrong[generator.choice(len(train), count, replace=False)] = True
    shift = generator.integers(1, CLASSES, len(train), np.int32)
    train_labels = np.where(is_wrong, (labels[train] + shift) % CLASSES, labels[train])
    return Data(
        Rows(images[train], train_labels),
        Rows(images[val], labels[val]),
        Rows(images[test], labels[test]),
        is_wrong,
    )


def stack(trees: list[Any]) -> Any:
    """Seeds along a new leading axis, for jax.vmap."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def batches(seed: int, num_rows: int, batch_size: int, steps: int) -> np.ndarray:
    """Places of rows, [steps, batch_size]: every epoch a new order, without its rest."""
    generator = np.random.default_rng([seed, 1])
    per_epoch = num_rows // batch_size
    epochs = [
        generator.permutation(num_rows)[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        for _ in range(-(-steps // per_epoch))
    ]
    return np.concatenate(epochs)[:steps].astype(np.int32)


class Network(nn.Module):
    """Two hidden layers, LayerNorm after each."""

    features: int = 64

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.relu(nn.LayerNorm()(nn.Dense(self.features)(x)))
        return nn.Dense(CLASSES)(x)


NETWORK = Network()


def init(seed: Any) -> Any:
    return NETWORK.init(jax.random.key(seed), jnp.zeros((1, 64), jnp.float32))["params"]


def row_losses(params: Any, rows: Rows) -> jax.Array:
    logits = NETWORK.apply({"params": params}, rows.images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows.labels)


def mean_loss(params: Any, rows: Rows) -> jax.Array:
    return row_losses(params, rows).mean()


def accuracy(params: Any, rows: Rows) -> jax.Array:
    logits = NETWORK.apply({"params": params}, rows.images)
    return jnp.mean(jnp.argmax(logits, -1) == rows.labels)
