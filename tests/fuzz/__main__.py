"""``python -m tests.fuzz SEED [--jaxpr] [--reduce]`` shows one program and how its dots compare,
``python -m tests.fuzz FIRST LAST`` a table of what came out by seeds, and those that are refused.
"""

import collections
import os
import sys
import time

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["JAX_ENABLE_X64"] = "1"

import jax

from tests.fuzz.programs import program
from tests.fuzz.reduce import outcome_or_crash, reduced


def replay(seed: int, *, jaxpr: bool, reduce: bool) -> None:
    found = reduced(program(seed)) if reduce else program(seed)
    print(found.text())
    if jaxpr:
        print(jax.make_jaxpr(found.loss)(*found.arrays()))
    result = outcome_or_crash(found)
    print("\n".join([result.kind, result.reason, result.message]))


def table(first: int, last: int) -> None:
    counts, start = collections.Counter(), time.time()
    seeds = collections.defaultdict(list)
    for seed in range(first, last):
        result = outcome_or_crash(program(seed))
        kind = result.kind, result.reason
        family = program(seed).family
        counts[family, *kind] += 1
        seeds[family, *kind].append(seed)
        if kind[0] in ("wrong", "crash"):
            print(seed, family, kind, result.message[:400], flush=True)
    print(f"{last - first} programs, {time.time() - start:.0f} s")
    for key in sorted(counts):
        print(*key, counts[key], seeds[key] if key[1] != "exact" else "", sep=" | ")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if not word.startswith("--")]
    if len(numbers) == 2:
        table(*numbers)
    else:
        replay(*numbers, jaxpr="--jaxpr" in sys.argv, reduce="--reduce" in sys.argv)
