import dataclasses
import json
import pathlib

import numpy as np
import pytest

from ghostjax.cli import main
from ghostjax.runs.analysis.mixture import domain_mixture
from ghostjax.runs.analysis.values import read_values
from ghostjax.runs.errors import UsageError
from ghostjax.runs.store.run import read_run
from tests.runs.checks import fails
from tests.runs.made_up import DOMAINS, EFFECTS, SETS, write_run
from tests.test_readme import snippets

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "pages" / "selection.md"


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("mixture") / "run")


@pytest.mark.quick("('prose',)")
@pytest.mark.parametrize("chosen", [SETS, *((name,) for name in SETS)], ids=str)
def test_weights_are_what_the_values_say(made_up, chosen):
    values = {name: read_values(read_run(made_up))[name] for name in chosen}
    found = {share.name: share for share in domain_mixture(values, rate=2.0)}
    first = values[chosen[0]]
    visits = {name: first.visits[first.domains == name].sum() for name in DOMAINS}
    total = sum(visits.values())
    grown = {}
    for name in DOMAINS:
        own = np.mean([valued.values[first.domains == name].sum() for valued in values.values()])
        grown[name] = visits[name] / total * np.exp(2 * total * own / visits[name])
        np.testing.assert_allclose(found[name].value, total * own / visits[name])
        np.testing.assert_allclose(found[name].visited, visits[name] / total)
    for name, share in found.items():
        expected = 0.999 * grown[name] / sum(grown.values()) + 0.001 / 3
        np.testing.assert_allclose(share.weight, expected, rtol=1e-5)
    if len(chosen) == 1:  # scores were drawn around these effects
        effects = {name: EFFECTS[name][SETS.index(chosen[0])] for name in DOMAINS}
        gains = {name: share.weight / share.visited for name, share in found.items()}
        assert sorted(gains, key=gains.get) == sorted(effects, key=effects.get)


def test_rank_writes_the_weights(made_up, tmp_path, capsys):
    path = tmp_path / "weights.json"
    path.write_text("of an earlier run")
    options = ["--set", "code", "--mixture", str(path), "--mixture-rate", "2"]
    assert main(["rank", str(made_up), *options]) == 0
    out = capsys.readouterr().out
    assert "Mixture" in out
    weights = json.loads(path.read_text())
    shares = domain_mixture({"code": read_values(read_run(made_up))["code"]}, 2.0)
    assert weights == {share.name: share.weight for share in shares}
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) > 0
    assert list(weights) == sorted(weights, key=weights.get, reverse=True)
    assert main(["rank", str(made_up), "--json", "--mixture", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)


def test_grain_mixes_by_the_file(made_up, tmp_path):
    grain = pytest.importorskip("grain", reason="grain is not installed")
    path = tmp_path / "weights.json"
    options = ["--set", "code", "--mixture", str(path), "--mixture-rate", "2", "--quiet"]
    assert main(["rank", str(made_up), *options]) == 0
    weights = json.loads(path.read_text())
    sources = {name: grain.MapDataset.source([name] * 500) for name in DOMAINS}
    mixed = grain.MapDataset.mix([sources[name] for name in weights], list(weights.values()))
    drawn = [mixed[n] for n in range(400)]
    for name, weight in weights.items():
        assert abs(drawn.count(name) - 400 * weight) <= 2


@pytest.mark.slow
def test_grain_as_the_page_says(made_up, tmp_path, monkeypatch):
    pytest.importorskip("grain", reason="grain is not installed")
    monkeypatch.chdir(tmp_path)
    options = ["--set", "code", "--mixture", "weights.json", "--quiet"]
    assert main(["rank", str(made_up), *options]) == 0
    [snippet] = snippets(PAGE.read_text(), "py")
    namespace = {"rows": {name: [name] * 7 for name in DOMAINS}}  # far fewer than are drawn
    exec(compile(snippet, str(PAGE), "exec"), namespace)
    drawn = [row for n in range(100) for row in namespace["mixed"][n]]
    assert len(drawn) == 400
    for name, weight in namespace["weights"].items():
        assert abs(drawn.count(name) - 400 * weight) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixture", "x.json", "--domain", "wiki"], "--mixture is of all examples"),
        (["--mixture-rate", "0"], "--mixture-rate must be positive, got 0.0"),
        (["--mixture-rate", "inf"], "--mixture-rate must be positive, got inf"),
    ],
)
def test_options_are_checked(made_up, options, message, capsys):
    assert message in fails(["rank", made_up, *options], capsys)


def test_domains_need_values(made_up):
    valued = read_values(read_run(made_up))["code"]
    visits = np.where(valued.domains == "noise", 0, valued.visits)
    with pytest.raises(UsageError, match="no example of domain noise was visited so far"):
        domain_mixture({"code": dataclasses.replace(valued, visits=visits)}, 1.0)
    values = np.where(valued.domains == "wiki", np.nan, valued.values)
    with pytest.raises(UsageError, match="domain wiki has a value that is not finite"):
        domain_mixture({"code": dataclasses.replace(valued, values=values)}, 1.0)
