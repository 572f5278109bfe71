"""What is refused of the programs that keep rows, or positions, apart; it can only shrink.

``python -m tests.fuzz 0 500`` prints what came out by seeds. An entry goes when it is exact.
"""

# By reason (the names of ``compare.REASONS``), the seeds.
# fmt: off
REFUSED: dict[str, tuple[int, ...]] = {
    "lost where a parameter is used": (
        7, 12, 30, 44, 50, 51, 60, 65, 92, 94, 102, 112, 113, 161, 165, 167, 172, 204,
        220, 242, 252, 257, 267, 270, 280, 283, 293, 307, 311, 320, 321, 333, 337, 366, 381,
        382, 385, 387, 410, 431, 435, 443, 460, 481, 492,
    ),
    "mixed rows are combined": (
        37, 41, 45, 104, 105, 135, 136, 142, 153, 154, 217, 230, 273, 305, 317, 325, 373,
        375, 484, 490, 495,
    ),
    "no position": (
        107, 226, 326, 376, 397, 426,
    ),
    "rows are combined": (
        116,
    ),
    "several axes": (
        16, 236, 246, 247, 287, 296, 454, 496,
    ),
}
# fmt: on
# Differences of neighbours, kept where the earlier one was: they count for the later position.
AMBIGUOUS = frozenset({157})
# The most that there may be.
MOST = {
    "lost where a parameter is used": 46,
    "mixed rows are combined": 21,
    "no position": 6,
    "rows are combined": 1,
    "several axes": 8,
}
