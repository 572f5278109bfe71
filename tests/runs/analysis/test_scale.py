"""Numbers as they are shown, and where axes have their ticks."""

import numpy as np
import pytest

from ghostjax.runs.analysis.scale import Scale, number
from ghostjax.runs.report.pictures import ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-7, 7, [-5, 0, 5]), (0, 23, [0, 5, 10, 15, 20])],
)
def test_ticks(low, high, expected):
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


def test_numbers_and_scales():
    assert number(1.23e-7) == "1.23\u00d710⁻⁷"
    assert number(-0.5) == "\u22120.500"
    scale = Scale.of(np.array([-2e-5, np.nan, 1e-6]))
    assert scale.words == "10⁻⁶"
    assert scale.signed(-2e-5) == "\u221220.0"
    assert scale.signed(1e-6) == "+1.0"
    assert scale.signed(1e-12) == scale.signed(-1e-12) == "0.0"
    assert Scale.of(np.zeros(3)).words == Scale.typical(np.zeros(3)).words == ""
    assert Scale.typical(np.array([*[0.001] * 19, 1e6])).words == "10⁻³"
    assert scale.plain(float("nan")) == "undefined"
