"""Data that the examples share: noisy pictures of four shapes, some of them with a wrong label."""

import numpy as np

SIZE, CLASSES = 8, 4
WRONG_EVERY = 8


def pictures(count: int, seed: int, *, wrong: bool = False) -> list[dict]:
    """Examples of a shape and its label; with ``wrong``, every eighth label is false."""
    rng = np.random.default_rng(seed)
    shapes = np.zeros((CLASSES, SIZE, SIZE), np.float32)
    shapes[0, 3:5], shapes[1, :, 3:5] = 1, 1  # a bar across, and one that stands
    shapes[2, 1:7, 1:7], shapes[3] = 1, np.eye(SIZE)
    examples = []
    for number in range(count):
        label = number % CLASSES
        x = shapes[label] + 0.3 * rng.standard_normal((SIZE, SIZE)).astype(np.float32)
        is_wrong = wrong and number % WRONG_EVERY == 0
        shown = (label + 1) % CLASSES if is_wrong else label
        examples.append(
            {
                "id": f"picture-{number}",
                "domain": "wrong" if is_wrong else "right",
                "x": x.reshape(-1),
                "y": np.int32(shown),
            }
        )
    return examples
