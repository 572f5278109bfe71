"""From examples to rows: which examples a step visits, and which window of a text it sees."""

from collections.abc import Iterator, Sequence

import numpy as np


def visit_order(examples: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of example indices [B], one shuffled epoch after another.

    At any time the visits of two examples differ by at most one, and no batch has an example
    twice. Needs ``batch_size <= examples``.

    >>> order = visit_order(3, 2, np.random.default_rng(0))
    >>> sorted(np.concatenate([next(order) for _ in range(3)]).tolist())
    [0, 0, 1, 1, 2, 2]
    """
    rest = np.empty(0, int)
    while True:
        if len(rest) < batch_size:
            epoch = rng.permutation(examples)
            # A batch that runs over the end of an epoch takes its other examples first.
            taken = np.isin(epoch, rest)
            rest = np.concatenate([rest, epoch[~taken], epoch[taken]])
        batch, rest = rest[:batch_size], rest[batch_size:]
        yield batch


def draw_starts(texts: Sequence[np.ndarray], length: int, rng: np.random.Generator) -> np.ndarray:
    """The first token of each row's window, [N]: 0 for texts of up to T + 1 tokens."""
    spare = [max(0, len(tokens) - (length + 1)) for tokens in texts]
    return rng.integers(0, np.array(spare) + 1)


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
