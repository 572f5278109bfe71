import shutil

import numpy as np
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from ghostjax.fidelity import step_weights
from ghostjax.runs import listed
from ghostjax.runs.analysis.values import sum_visits
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store import begin, files, schema
from ghostjax.runs.store.run import read_run
from tests.runs import small_run

STEPS = 8
BOTH = ("predicted", "actual")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return small_run.write(tmp_path_factory.mktemp("whole") / "run", STEPS)


@pytest.fixture
def out(whole, tmp_path):
    """A copy to spoil."""
    return shutil.copytree(whole, tmp_path / "run")


def part(out, table, first, end):
    return out / "log" / schema.part_name(table, first, end)


def test_a_run_has_its_tables(whole):
    run = read_run(whole)
    assert (run.path, run.sets, run.end, run.summary) == (whole, small_run.SETS, STEPS, None)
    assert run.metadata == {"schema_version": schema.SCHEMA_VERSION, "sets": ["val", "clean"]}
    assert run.examples["id"].to_pylist() == list(small_run.IDS)
    assert run.steps["step"].to_pylist() == list(range(STEPS))
    assert len(run.scores) == STEPS * small_run.BATCH_SIZE
    assert len(run.kinds) == STEPS * 4
    assert run.scores is run.scores


def test_a_run_that_is_over_has_a_summary(out):
    files.write_json(out / "summary.json", {"steps": STEPS})
    assert read_run(out).summary == {"steps": STEPS}


def test_values_are_the_sums_of_the_visits(whole):
    visits, values, errors, fourths = sum_visits(read_run(whole))
    decreases = [small_run.rows("steps", step) for step in range(STEPS)]
    weights = {
        name: step_weights(*([row[f"{which}_{name}"] for row in decreases] for which in BOTH))
        for name in small_run.SETS
    }
    assert min(weights["val"].min(), weights["clean"].min()) < 1
    rows = [row for step in range(STEPS) for row in visit_rows(step)]
    for n, example in enumerate(small_run.IDS):
        own = [row for row in rows if row["id"] == example]
        assert visits[n] == len(own) > 0
        for k, name in enumerate(small_run.SETS):
            weight = [weights[name][row["step"]] for row in own]
            total = sum(w * float(row[f"score_{name}"]) for w, row in zip(weight, own))
            errors_of = [w * float(row[f"error_{name}"]) for w, row in zip(weight, own)]
            square = sum(error**2 for error in errors_of)
            np.testing.assert_allclose(fourths[n, k], sum(e**4 for e in errors_of), rtol=1e-12)
            np.testing.assert_allclose(values[n, k], total, rtol=1e-12)
            np.testing.assert_allclose(errors[n, k], np.sqrt(square), rtol=1e-12)
    assert (visits.dtype, values.dtype, errors.dtype) == (np.int64, np.float64, np.float64)
    assert values.shape == errors.shape == (len(small_run.IDS), len(small_run.SETS))


def visit_rows(step):
    columns = small_run.rows("scores", step)
    return [
        {name: value[i] if np.ndim(value) else value for name, value in columns.items()}
        for i in range(small_run.BATCH_SIZE)
    ]


def test_an_example_without_a_visit_has_no_value(tmp_path):
    visits, values, errors, _ = sum_visits(read_run(small_run.write(tmp_path / "run", steps=1)))
    assert sorted(visits) == [0, 1, 1, 1]
    for found in (values, errors):
        assert np.isnan(found).all(1).tolist() == (visits == 0).tolist()


def test_a_run_that_was_cut_off_is_what_all_tables_hold(out):
    part(out, "steps", 6, 8).unlink()
    part(out, "kinds", 4, 6).unlink()
    part(out, "kinds", 6, 8).unlink()
    run = read_run(out)
    assert run.end == 4
    for table in schema.LOG_TABLES:
        assert getattr(run, table)["step"].to_numpy().max() == 3
    expected = read_run(small_run.write(out.parent / "shorter", 4))
    assert run.scores == expected.scores
    for found, wanted in zip(sum_visits(run), sum_visits(expected)):
        np.testing.assert_array_equal(found, wanted)


def test_a_cut_inside_another_tables_part(out):
    small_run.write(out.parent / "other", 5, every=5)
    for first in range(0, STEPS, 2):
        part(out, "steps", first, first + 2).unlink()
    shutil.copy(part(out.parent / "other", "steps", 0, 5), out / "log")
    run = read_run(out)
    assert run.end == 5
    assert run.scores["step"].to_pylist() == sorted([*range(5)] * small_run.BATCH_SIZE)


def test_a_run_that_just_began_has_no_values(tmp_path):
    small_run.begin(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.end == len(run.scores) == len(run.steps) == len(run.kinds) == 0
    assert run.scores.schema.equals(schema.table_schema("scores", small_run.SETS))
    with pytest.raises(UsageError, match=r"run: no steps in the log yet"):
        sum_visits(run)


def write(name, text):
    return lambda out: (out / name).write_text(text)


def change_metadata(**changes):
    return lambda out: files.write_json(
        out / "run.json", files.read_json(out / "run.json") | changes
    )


def finish_without(*removed):
    def spoil(out):
        files.write_json(out / "summary.json", {"steps": STEPS})
        for table in removed:
            part(out, table, 6, 8).unlink()

    return spoil


BAD_RUNS = {
    "missing": (shutil.rmtree, "run does not exist"),
    "no run": (lambda out: (out / "run.json").unlink(), "run is not a run directory: .* run.json"),
    "broken": (write("run.json", '{"sets": '), r"run\.json: not valid JSON"),
    "not text": (lambda out: (out / "run.json").write_bytes(b'"\xff'), "not valid JSON"),
    "no object": (write("run.json", "[]"), r"run\.json: expected a JSON object, found list"),
    "no version": (change_metadata(schema_version="1"), "no schema_version in it"),
    "no sets": (change_metadata(sets=["a_b"]), "no names of validation sets in it"),
    "newer": (
        change_metadata(schema_version=schema.SCHEMA_VERSION + 1),
        r"run has schema version \d+, this ghostjax knows versions up to \d+: update ghostjax",
    ),
    "summary": (write("summary.json", "{"), r"summary\.json: not valid JSON"),
    "gap": (
        lambda out: part(out, "scores", 4, 6).unlink(),
        "run/log/scores: steps 4 to 5 are missing",
    ),
    "first": (lambda out: part(out, "kinds", 0, 2).unlink(), "log/kinds: steps 0 to 1 are missing"),
    "last": (finish_without("scores"), "log/scores: steps 6 to 7 are missing"),
    "last of all": (finish_without(*schema.LOG_TABLES), "log/scores: steps 6 to 7 are missing"),
    "last two": (finish_without("steps", "kinds"), "log/steps: steps 6 to 7 are missing"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_directories_that_cannot_be_read_are_refused(out, spoil, message):
    spoil(out)
    with pytest.raises(UsageError, match=message) as raised:
        read_run(out)
    assert "\n" not in str(raised.value)
    assert str(out) in str(raised.value)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UsageError, match="run is not a directory"):
        read_run(tmp_path / "run")


def truncate(out):
    path = part(out, "scores", 2, 4)
    path.write_bytes(path.read_bytes()[:-100])


def rename_steps(out):
    part(out, "steps", 6, 8).unlink()
    part(out, "steps", 4, 6).rename(part(out, "steps", 4, 8))


def change_examples(**changes):
    def spoil(out):
        table = pq.read_table(out / "examples.parquet")
        for name, values in changes.items():
            index = table.schema.get_field_index(name)
            field = table.schema.field(name)
            table = table.set_column(index, field, pyarrow.array(values, field.type))
        files.write_table(out / "examples.parquet", table)

    return spoil


BAD_TABLES = {
    "half a part": (truncate, r"scores-00000002-00000004\.parquet cannot be read: "),
    "no part": (
        lambda out: part(out, "scores", 2, 4).write_bytes(b""),
        r"scores-00000002-00000004\.parquet cannot be read: ",
    ),
    "a directory": (
        lambda out: (part(out, "scores", 2, 4).unlink(), part(out, "scores", 2, 4).mkdir()),
        r"scores-00000002-00000004\.parquet",
    ),
    "other steps": (
        lambda out: shutil.copy(part(out, "kinds", 0, 2), part(out, "kinds", 2, 4)),
        r"kinds-00000002-00000004\.parquet: .*expected the steps from 2 to 3",
    ),
    "fewer steps": (rename_steps, r"steps-00000004-00000008\.parquet: .*the steps from 4 to 7"),
    "other columns": (
        lambda out: shutil.copy(part(out, "kinds", 0, 2), part(out, "scores", 0, 2)),
        r"scores-00000000-00000002\.parquet: expected the columns step int64, id string",
    ),
    "no examples": (
        lambda out: (out / "examples.parquet").unlink(),
        r"examples\.parquet is missing",
    ),
    "unknown id": (change_examples(id=["a:0", "a:1", "b:0", "c:0"]), "the log has id 'b:1', which"),
    "id twice": (change_examples(id=["a:0", "a:1", "b:0", "b:0"]), "an id is there twice"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_cannot_be_read_are_refused(out, spoil, message):
    spoil(out)
    run = read_run(out)
    with pytest.raises(UsageError, match=message) as raised:
        _ = sum_visits(run), run.steps, run.kinds
    assert "\n" not in str(raised.value)
    assert str(out) in str(raised.value)


def read_with_pyarrow(pyarrow, files):
    return pyarrow.dataset.dataset([str(file) for file in files]).to_table().to_pylist()


def read_with_pandas(pandas, files):
    frame = pandas.concat([pandas.read_parquet(file) for file in files]).astype(object)
    return frame.where(frame.notna(), None).to_dict("records")


def read_with_polars(polars, files):
    return polars.read_parquet(files).to_dicts()


def read_with_duckdb(duckdb, files):
    found = duckdb.execute("select * from read_parquet(?)", [[str(file) for file in files]])
    names = [column[0] for column in found.description]
    return [dict(zip(names, row)) for row in found.fetchall()]


READERS = {
    "pyarrow": read_with_pyarrow,
    "pandas": read_with_pandas,
    "polars": read_with_polars,
    "duckdb": read_with_duckdb,
}


@pytest.mark.parametrize("library", READERS)
@pytest.mark.parametrize("table", schema.LOG_TABLES)
def test_the_log_is_read_without_ghostjax(whole, library, table):
    module = pytest.importorskip(library)
    rows = READERS[library](module, sorted((whole / "log").glob(f"{table}-*.parquet")))
    assert rows == getattr(read_run(whole), table).to_pylist()


def test_examples_are_written_as_they_come_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(listed, "BLOCK", 2)
    rows = [(f"a:{n}", "a", n, "text") for n in range(5)]
    begin.write_examples(tmp_path, iter(rows))
    path = tmp_path / "examples.parquet"
    assert pq.ParquetFile(path).metadata.num_row_groups == 3
    found = files.read_table(path, "examples", ())
    assert [tuple(row.values()) for row in found.to_pylist()] == rows
    assert files.read_table(path, "examples", (), ["size"]).column_names == ["size"]

    def until_it_breaks():
        yield from rows
        raise KeyboardInterrupt

    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        begin.write_examples(tmp_path, until_it_breaks())
    assert [file.name for file in tmp_path.iterdir()] == ["examples.parquet"]
    assert path.read_bytes() == before
