import numpy as np
import pyarrow as pa
import pytest

from ghostjax.runs.analysis.summary import make_summary, own_above, values_by_domain
from ghostjax.runs.analysis.values import Valued
from ghostjax.runs.store.run import read_run
from tests.runs.made_up import EXAMPLES, SETS, write_run


def valued(domains, values, visits):
    texts = np.array(domains, object)
    values = np.array(values, float)
    return Valued(texts, texts, texts, np.array(visits), values, *np.zeros((2, len(values))))


def test_values_by_domain():
    assert values_by_domain(valued(["b", "a", "b", "c"], [1, 4, 2, 0], [1, 2, 1, 0])) == {
        "a": {"examples": 1, "visits": 2, "value": 4.0, "mean": 4.0},
        "b": {"examples": 2, "visits": 2, "value": 3.0, "mean": 1.5},
        "c": {"examples": 1, "visits": 0, "value": 0.0, "mean": None},
    }


@pytest.mark.parametrize(
    ("domains", "visits", "expected"),
    [
        (["prose", "code", "code"], [1, 1, 0], 1.0),
        (["code", "prose", "code"], [1, 1, 1], 0.0),
        (["prose", "code", "forum"], [1, 1, 1], 0.5),
        (["prose", "prose", "prose"], [1, 1, 1], None),
        (["prose", "prose", "code"], [1, 1, 0], None),
        (["code", "code", "code"], [1, 1, 1], None),
    ],
)
def test_how_well_a_set_tells_its_own_domain(domains, visits, expected):
    assert own_above("prose", valued(domains, [2, 1, 3], visits)) == expected


def test_an_auc_of_zero_is_in_the_summary(tmp_path):
    """Of a set whose own domain has the lowest values of all."""
    low = {f"noise:{n}": -1.0 for n in range(2, EXAMPLES, 3)}
    run = read_run(write_run(tmp_path / "run", sets=("noise", "code"), changes=low))
    summary, tables = make_summary(run, 1.0)
    table = pa.concat_tables(tables)
    assert summary["auc"] == {"noise": 0.0}
    assert table["verdict_noise"].to_pylist() == ["few visits"] * EXAMPLES


def test_examples_without_a_visit_have_neither_value_nor_error(tmp_path):
    run = read_run(write_run(tmp_path / "run", steps=3, finished=False))
    _, tables = make_summary(run, 1.0)
    table = pa.concat_tables(tables)
    unvisited = [visits == 0 for visits in table["visits"].to_pylist()]
    assert any(unvisited)
    for name in SETS:
        for column in ("value", "error"):
            missing = [value is None for value in table[f"{column}_{name}"].to_pylist()]
            assert missing == unvisited
        verdicts = table[f"verdict_{name}"].to_pylist()
        assert [verdict == "not visited" for verdict in verdicts] == unvisited
