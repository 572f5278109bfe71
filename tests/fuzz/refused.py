"""What is refused of the programs that keep rows, or positions, apart; it can only shrink.

``python -m tests.fuzz 0 500`` prints what came out by seeds. An entry goes when it is exact.
"""

# By reason (the names of ``compare.REASONS``), the seeds.
# fmt: off
REFUSED: dict[str, tuple[int, ...]] = {
    "lost where a parameter is used": (7, 50, 65, 161, 167, 252, 270, 283, 311, 385, 443),
    "mixed rows are combined": (37, 112, 136, 217, 230, 247, 305, 317, 373, 435, 495),
    "no position": (107, 226, 326, 376, 397, 426),
}
# fmt: on
# Differences of neighbours, kept where the earlier one was: they count for the later position.
AMBIGUOUS = frozenset({157})
# The most that there may be.
MOST = {
    "lost where a parameter is used": 11,
    "mixed rows are combined": 11,
    "no position": 6,
}
