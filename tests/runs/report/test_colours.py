"""The colours of the report: enough contrast, and one meaning each."""

import re

import numpy as np
import pytest

from ghostjax.runs.report.html import DARK, LIGHT
from ghostjax.runs.report.page import make_report
from ghostjax.runs.store.run import read_run
from tests.runs.made_up import write_run


def luminance(colour):
    """Relative luminance as WCAG 2 defines it."""
    parts = np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(first, second):
    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast_is_enough_in_both_themes(theme):
    for name in ("ink", "soft", "helps", "hurts", "good", "fair", "poor", "s1"):
        for ground in (theme.page, theme.panel):
            assert contrast(getattr(theme, name), ground) >= 4.5, name
    for name in ("s1", "s2", "s3", "s4", "s5", "s6"):
        assert contrast(getattr(theme, name), theme.page) >= 3, name


def test_the_style_has_no_colours_but_those_of_the_themes(tmp_path):
    report = make_report(read_run(write_run(tmp_path / "run")))
    style = report.split("<style>")[1].split("</style>")[0]
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", style)) == set(LIGHT) | set(DARK)
    used = set(re.findall(r"var\(--(\w+)\)", style))
    assert used == set(LIGHT._fields)
    assert "@media (prefers-color-scheme: dark) { :root { --page: #14171c;" in style


def test_the_colours_of_lines_are_none_of_helps_and_hurts():
    for theme in (LIGHT, DARK):
        lines = {getattr(theme, f"s{n}") for n in range(1, 7)}
        assert len(lines) == 6
        assert not lines & {theme.helps, theme.hurts, theme.good, theme.fair, theme.poor}
