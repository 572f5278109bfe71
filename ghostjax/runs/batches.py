"""From documents to rows: which documents a step visits, and which window of each it sees."""

from collections.abc import Iterator, Sequence

import numpy as np

from ghostjax.runs.documents import Document


def visit_order(documents: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless batches of document indices [B], one shuffled epoch after another.

    At any time the visits of two documents differ by at most one, and no batch has a document
    twice. Needs ``batch_size <= documents``.

    >>> order = visit_order(3, 2, np.random.default_rng(0))
    >>> sorted(np.concatenate([next(order) for _ in range(3)]).tolist())
    [0, 0, 1, 1, 2, 2]
    """
    rest = np.empty(0, int)
    while True:
        if len(rest) < batch_size:
            epoch = rng.permutation(documents)
            # A batch that runs over the end of an epoch takes its other documents first.
            taken = np.isin(epoch, rest)
            rest = np.concatenate([rest, epoch[~taken], epoch[taken]])
        batch, rest = rest[:batch_size], rest[batch_size:]
        yield batch


def draw_starts(documents: Sequence[Document], length: int, rng: np.random.Generator) -> np.ndarray:
    """The first token of each row's window, [N]: 0 for documents of up to T + 1 tokens."""
    spare = [max(0, len(document.tokens) - (length + 1)) for document in documents]
    return rng.integers(0, np.array(spare) + 1)


def make_rows(
    documents: Sequence[Document], starts: Sequence[int], length: int
) -> dict[str, np.ndarray]:
    """The windows of T + 1 tokens from ``starts``, as inputs and the tokens that follow them.

    Returns:
      ``inputs`` and ``targets``, int32 [N, T], and ``mask``, float32 [N, T]: 1 where there is a
      target, 0 where the document has ended.

    >>> rows = make_rows([Document("a:0", "a", b"abc")], [0], 3)
    >>> rows["inputs"].tolist(), rows["targets"].tolist(), rows["mask"].tolist()
    ([[97, 98, 0]], [[98, 99, 0]], [[1.0, 1.0, 0.0]])
    """
    shape = (len(documents), length)
    inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.float32)
    for row, (document, start) in enumerate(zip(documents, starts)):
        window = np.frombuffer(document.tokens[start : start + length + 1], np.uint8)
        count = len(window) - 1
        inputs[row, :count], targets[row, :count], mask[row, :count] = window[:-1], window[1:], 1
    return {"inputs": inputs, "targets": targets, "mask": mask}
