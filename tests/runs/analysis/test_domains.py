import dataclasses

import numpy as np
import pytest

from ghostjax.runs.analysis.domains import by_domain
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.store.run import read_run
from tests.runs.made_up import DOMAINS, write_run


@pytest.mark.parametrize("by", ["value", "mean"])
def test_examples_are_grouped_by_domain(tmp_path, by):
    valued = read_values(read_run(write_run(tmp_path / "run", steps=3, finished=False)))["code"]
    found = by_domain(valued, by)
    assert {one.name for one in found} == set(DOMAINS)
    assert [one.mean for one in found] == sorted((one.mean for one in found), reverse=True)
    for one in found:
        own = valued.select(valued.domains == one.name)
        measured = own.measured(by)[0][own.visits > 0]
        assert (one.examples, one.visits) == (len(own), own.visits.sum())
        np.testing.assert_array_equal(one.measured, np.sort(measured)[::-1])
        figures = [
            np.nansum(own.values),
            measured.mean(),
            np.median(measured),
            (measured > 0).mean(),
        ]
        np.testing.assert_allclose([one.total, one.mean, one.median, one.helped], figures)


def test_a_domain_without_a_visit_is_last(tmp_path):
    valued = read_values(read_run(write_run(tmp_path / "run")))["code"]
    is_first = valued.domains == DOMAINS[0]
    visits, values = np.where(is_first, 0, valued.visits), np.where(is_first, np.nan, valued.values)
    found = by_domain(dataclasses.replace(valued, visits=visits, values=values))
    assert found[-1].name == DOMAINS[0]
    assert np.isnan([found[-1].mean, found[-1].median, found[-1].helped]).all()
    assert by_domain(valued.select(slice(0))) == []
