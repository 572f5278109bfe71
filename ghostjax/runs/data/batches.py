"""From examples to rows: which examples a step visits, and which window of a text it sees."""

from collections.abc import Sequence

import numpy as np

from ghostjax.runs.mapped import mapped_range


class VisitOrder:
    """The example indices [B] of any step, in one shuffled epoch after another.

    At any time the visits of two examples differ by at most one, and no batch has an example
    twice. A step is found without those before it: that of a million costs what the first does.

    >>> order = VisitOrder(examples=3, batch_size=2, seed=0)
    >>> sorted(np.concatenate([order(step) for step in range(3)]).tolist())
    [0, 0, 1, 1, 2, 2]

    Raises:
      ValueError: a batch is larger than the examples.
    """

    def __init__(self, examples: int, batch_size: int, seed: int):
        if not 1 <= batch_size <= examples:
            raise ValueError(f"batch_size must be from 1 to {examples}, got {batch_size}.")
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self._recent: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> np.ndarray:
        epoch, first = divmod(step * self._batch_size, self._examples)
        batch = self._epoch(epoch)[first : first + self._batch_size]
        missing = self._batch_size - len(batch)
        return np.concatenate([batch, self._epoch(epoch + 1)[:missing]]) if missing else batch

    def _epoch(self, number: int) -> np.ndarray:
        """The order of an epoch. The batch that runs over its beginning has no example twice."""
        if number not in self._recent:
            first = number
            while self._depends(first, number):
                first -= 1
            order = self._recent.get(first)
            order = self._shuffled(first) if order is None else order
            for later in range(first + 1, number + 1):
                order = self._after(order, later)
            kept = {old: self._recent[old] for old in [number - 1] if old in self._recent}
            self._recent = {**kept, number: order}
        return self._recent[number]

    def _depends(self, epoch: int, number: int) -> bool:
        """Whether the order of an epoch up to ``number`` depends on the one before it.

        What is moved to the end of a batch stays in the first B places of an epoch, so the end of
        an epoch of two batches or more is as it was shuffled.
        """
        if epoch in self._recent or not self._left(epoch):
            return False
        return epoch == number or self._examples < 2 * self._batch_size

    def _left(self, epoch: int) -> int:
        """How many examples are left of the epochs before it, less than a batch."""
        return self._examples * epoch % self._batch_size

    def _after(self, before: np.ndarray, epoch: int) -> np.ndarray:
        order, left = self._shuffled(epoch), self._left(epoch)
        if not left:
            return order
        first = order[: self._batch_size]  # in which all fresh ones are that are needed
        fresh = np.flatnonzero(~np.isin(first, before[-left:]))[: self._batch_size - left]
        first[:] = np.concatenate([first[fresh], np.delete(first, fresh)])
        return order

    def _shuffled(self, epoch: int) -> np.ndarray:
        """As ``permutation`` has it, in a file that is mapped."""
        order = mapped_range(self._examples)
        generator(self._seed, "order", epoch).shuffle(order)
        return order


def generator(seed: int, use: str, number: int) -> np.random.Generator:
    """Random numbers for one use at one step or epoch, whatever was drawn for others.

    >>> generator(0, "order", 3).integers(9) == generator(0, "order", 3).integers(9)
    np.True_
    """
    return np.random.default_rng([seed, number, *use.encode()])


def draw_starts(sizes: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """The first token of each row's window, [N]: 0 for texts of up to T + 1 tokens.

    Args:
      sizes: integers [N], how many tokens the texts have.
    """
    return rng.integers(0, np.maximum(0, np.int64(sizes) - (length + 1)) + 1)


def make_rows(
    texts: Sequence[np.ndarray], starts: Sequence[int], length: int
) -> dict[str, np.ndarray]:
    """The windows of T + 1 tokens from ``starts``, as inputs and the tokens that follow them.

    Returns:
      ``inputs`` and ``targets``, int32 [N, T], and ``mask``, float32 [N, T]: 1 where there is a
      target, 0 where the text has ended.

    >>> rows = make_rows([np.frombuffer(b"abc", np.uint8)], [0], 3)
    >>> rows["inputs"].tolist(), rows["targets"].tolist(), rows["mask"].tolist()
    ([[97, 98, 0]], [[98, 99, 0]], [[1.0, 1.0, 0.0]])
    """
    shape = (len(texts), length)
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for row, (tokens, start) in enumerate(zip(texts, starts)):
        window = tokens[start : start + length + 1]
        count = len(window) - 1
        inputs[row, :count], targets[row, :count], mask[row, :count] = window[:-1], window[1:], 1
    return {"inputs": inputs, "targets": targets, "mask": mask}
