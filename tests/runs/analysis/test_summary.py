import numpy as np
import pytest

from ghostjax.runs.analysis.summary import own_above, values_by_domain
from ghostjax.runs.analysis.values import Valued


def valued(domains, values, visits):
    texts = np.array(domains, object)
    values = np.array(values, float)
    return Valued(texts, texts, texts, np.array(visits), values, np.zeros_like(values))


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
        (["prose", "code", "forum"], [1, 1, 1], 0.5),
        (["prose", "prose", "prose"], [1, 1, 1], None),
        (["prose", "prose", "code"], [1, 1, 0], None),
        (["code", "code", "code"], [1, 1, 1], None),
    ],
)
def test_how_well_a_set_tells_its_own_domain(domains, visits, expected):
    assert own_above("prose", valued(domains, [2, 1, 3], visits)) == expected
