"""What is refused of the programs that keep rows, or positions, apart; it can only shrink.

``python -m tests.fuzz 0 500`` prints what came out by seeds. An entry goes when it is exact.
"""

# By reason (the names of ``compare.REASONS``), the seeds.
# fmt: off
REFUSED: dict[str, tuple[int, ...]] = {
    "lost where a parameter is used": (
        7, 12, 30, 32, 44, 45, 50, 51, 65, 92, 94, 102, 112, 113, 161, 165, 167, 172, 204, 212,
        220, 242, 252, 253,
    ),
    "mixed rows are combined": (
        37, 41, 104, 105, 135, 136, 142, 153, 154, 217, 230, 232,
    ),
    "no position": (
        107, 226,
    ),
    "rows are combined": (
        11, 26, 116,
    ),
    "several axes": (
        16, 236, 246, 247, 257,
    ),
}
# fmt: on
# The most that there may be.
MOST = {
    "lost where a parameter is used": 24,
    "mixed rows are combined": 12,
    "no position": 2,
    "rows are combined": 3,
    "several axes": 5,
}
