"""A small run directory with made-up numbers, as the schema says, written without any training.

Examples of the domain ``wiki`` help the set ``prose``, those of ``scripts`` help ``code``, and
``noise`` hurts both.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ghostjax.runs.store import files, schema

SETS = ("prose", "code")
DOMAINS = ("wiki", "scripts", "noise")
KINDS = ("attention", "mlp", "layernorm", "embedding")
EXAMPLES, STEPS, BATCH_SIZE, PARTS = 40, 30, 8, (0, 16, 30)
EFFECTS = {"wiki": (3e-3, 1e-3), "scripts": (5e-4, 3e-3), "noise": (-1e-3, -8e-4)}

_EXCERPTS = {
    "wiki": "The river rises in the hills north of the town and is joined by two streams, ",
    "scripts": "def window(rows, size): return [rows[n : n + size] for n in range(len(rows))] ",
    "noise": "xq 0x7f kk3 ;; zzzt 11010 ~~ fnord qqq ",
}


def write_run(
    path: Path,
    *,
    sets: tuple[str, ...] = SETS,
    steps: int = STEPS,
    seed: int = 0,
    error: float = 4e-4,
    finished: bool = True,
    domains: tuple[str, ...] | None = None,
    excerpts: dict[int, str] | None = None,
    changes: dict[str, float] | None = None,
    ids: tuple[str, ...] | None = None,
    memory: float = 1.0,
    **metadata: Any,
) -> Path:
    """Writes a run directory.

    Args:
      seed: Of the noise and of the order of the examples.
      error: Standard error of a score, and the size of its noise.
      finished: Whether values.parquet and summary.json are there.
      domains: Of the examples; by default DOMAINS in turn.
      excerpts: Texts of some examples, by their number.
      changes: What is added to every score of an example, by its id.
      ids: Of the examples.
      memory: How much larger the decrease by an update is than the sum of the scores.
      metadata: Further entries of run.json.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    (path / "log").mkdir(exist_ok=True)
    if domains is None:
        domains = tuple(DOMAINS[n % 3] for n in range(EXAMPLES))
    if ids is None:
        ids = tuple(f"{domain}:{n}" for n, domain in enumerate(domains))
    texts = [_EXCERPTS.get(domain, f"of {domain} ") * 2 for domain in domains]
    for number, text in (excerpts or {}).items():
        texts[number] = text
    _write(
        path / "examples.parquet",
        "examples",
        sets,
        {"id": ids, "domain": domains, "size": [len(text) for text in texts], "excerpt": texts},
    )
    log = _make_log(rng, sets, steps, ids, domains, error, changes or {}, memory)
    cuts = sorted({min(cut, steps) for cut in (*PARTS, steps)})
    for first, end in itertools.pairwise(cuts):
        for name, columns in log.items():
            within = (columns["step"] >= first) & (columns["step"] < end)
            part = {column: values[within] for column, values in columns.items()}
            _write(path / "log" / schema.part_name(name, first, end), name, sets, part)
    options = {"steps": STEPS, "batch_size": BATCH_SIZE, "seed": seed, "out": "made-up"}
    record = {
        "schema_version": schema.SCHEMA_VERSION,
        "id": "made-up",
        "sets": list(sets),
        "options": options,
        "fingerprints": {"data": "made-up", "params": f"made-up {seed}"},
        "task": "text",
        "unit": "nats per token",
        "kinds": list(KINDS),
        "examples": len(ids),
        "val_examples": dict.fromkeys(sets, 16),
        "seed": seed,
        **metadata,
    }
    record["options"] = {**options, **metadata.get("options", {})}
    files.write_json(path / "run.json", record)
    if finished:
        _finish(path, sets, ids, domains, log, options)
    return path


def changed_steps(path: Path, step: int, **columns: float) -> None:
    """Changes columns of a step in the log of a run."""
    for part in (path / "log").glob("steps-*.parquet"):
        table = pq.read_table(part)
        rows = table.to_pylist()
        for row in rows:
            if row["step"] == step:
                row.update(columns)
        files.write_table(part, pa.Table.from_pylist(rows, table.schema))


def _make_log(
    rng, sets, steps, ids, domains, error, changes, memory
) -> dict[str, dict[str, np.ndarray]]:
    step = np.arange(steps)
    fading = 1 / (1 + step / 10)
    orders = [rng.permutation(len(ids)) for _ in range(steps * BATCH_SIZE // len(ids) + 1)]
    which = np.concatenate(orders)[: steps * BATCH_SIZE]
    visit_step = np.repeat(step, BATCH_SIZE)
    scores = {
        "step": visit_step,
        "id": np.array(ids, object)[which],
        "start": np.zeros(len(which), int),
        "loss": 2 + fading[visit_step] + rng.normal(0, 0.2, len(which)),
        "learning_rate": np.full(len(which), 1e-3),
    }
    scores["norm"] = 0.5 * scores["loss"]
    table = {
        "step": step,
        "loss": 2 + fading,
        "learning_rate": np.full(steps, 1e-3),
        "undefined": np.zeros(steps, int),
    }
    kinds = {"step": [], "kind": [], "set": [], "score": []}
    own = np.random.default_rng(7).normal(0, 1e-3, len(ids))  # the same in every run
    for k, name in enumerate(sets):
        mean = np.array([EFFECTS.get(domain, (1e-4, 1e-4))[k % 2] for domain in domains]) + own
        score = mean[which] * fading[visit_step] + rng.normal(0, error, len(which))
        score += [changes.get(ids[n], 0.0) for n in which]
        scores[f"score_{name}"] = score
        scores[f"error_{name}"] = error * rng.uniform(0.7, 1.3, len(which))
        predicted = memory * np.bincount(visit_step, score, steps)
        table[f"val_loss_{name}"] = 3.0 + k + fading
        table[f"predicted_{name}"] = predicted
        table[f"actual_{name}"] = 0.9 * predicted + rng.normal(0, 1e-3, steps)
        table[f"conservation_error_{name}"] = rng.uniform(1e-7, 3e-6, steps)
        table[f"audit_error_{name}"] = np.where(step % 10 == 0, 1e-6, None)
        table[f"correlation_{name}"] = rng.uniform(0.5, 0.9, steps)
        for kind, part in zip(KINDS, (0.5, 0.35, -0.05, 0.2), strict=True):
            kinds["step"].append(step)
            kinds["kind"].append(np.full(steps, kind, object))
            kinds["set"].append(np.full(steps, name, object))
            kinds["score"].append(part * predicted / memory)
    joined = {name: np.concatenate(parts) for name, parts in kinds.items()}
    order = np.argsort(joined["step"], kind="stable")
    return {"scores": scores, "steps": table, "kinds": {k: v[order] for k, v in joined.items()}}


def _finish(path, sets, ids, domains, log, options) -> None:
    index = {name: n for n, name in enumerate(ids)}
    which = np.array([index[name] for name in log["scores"]["id"]])
    visits = np.bincount(which, minlength=len(ids))
    columns = {"id": ids, "domain": domains, "visits": visits}
    by_domain = {}
    for name in sets:
        value = np.bincount(which, log["scores"][f"score_{name}"].astype(np.float32), len(ids))
        error = log["scores"][f"error_{name}"].astype(np.float32).astype(float)
        columns[f"value_{name}"] = value
        columns[f"error_{name}"] = np.sqrt(np.bincount(which, error**2, len(ids)))
        columns[f"verdict_{name}"] = ["unclear"] * len(ids)
        by_domain[name] = {
            domain: {
                "examples": domains.count(domain),
                "visits": int(visits[[d == domain for d in domains]].sum()),
                "value": float(value[[d == domain for d in domains]].sum()),
                "mean": float(value[[d == domain for d in domains]].mean()),
            }
            for domain in dict.fromkeys(domains)
        }
    _write(path / "values.parquet", "values", sets, columns)
    table = log["steps"]
    summary = {
        "schema_version": schema.SCHEMA_VERSION,
        "finished": True,
        "steps": len(table["step"]),
        "loss": float(table["loss"][-1]),
        "val_loss": {name: float(table[f"val_loss_{name}"][-1]) for name in sets},
        "domains": by_domain,
        "auc": None,
        "fidelity": {name: {"prediction_correlation": 0.9} for name in sets},
        "warnings": [],
        "seconds": 12.5,
        "options": options,
    }
    files.write_json(path / "summary.json", summary)


def _write(path, table, sets, columns) -> None:
    fields = schema.table_schema(table, sets)
    arrays = [pa.array(list(columns[field.name]), field.type) for field in fields]
    files.write_table(path, pa.table(arrays, schema=fields))
