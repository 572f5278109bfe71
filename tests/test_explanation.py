"""How an explanation is printed."""

import io

import jax.numpy as jnp
import pytest
import rich.console

from ghostjax import explain
from ghostjax._explanation import in_units
from models.arrays import draw

TINY = """\
parameter  meets data in                          times  row axis  dots  route       FLOP  late route  late FLOP  late bytes
['b']      add at test_explanation.py:##              1  0         rows  features    320   features         320          64
['w']      dot_general at test_explanation.py:##      1  0         rows  tangent   7.18 k  tangent        7.18 k     2.50 Ki

norm of  uses  route       FLOP  bytes kept
['b']       1  features    288           0
['w']       1  rows      3.26 k          0

4 rows, 2 directions, on cpu
plain step              7.69 k FLOP
value_grad_and_dots     15.2 k FLOP, 1.98 of the plain step
value_and_dots_fn       15.2 k FLOP, 1.98 of the plain step; keeps 2.56 KiB of factors
squared_norms           7.42 k FLOP, 0.97 of the plain step
value_and_clipped_grad  13.0 k FLOP, 1.69 of the plain step
norms=True adds 3.58 k FLOP to value_grad_and_dots
unused: ['unused']
memory: parameters 128 B, data 1.50 KiB, direction 256 B, gradient 128 B
and about 3.06 KiB in value_grad_and_dots or 3.09 KiB in value_and_dots_fn, 1.09 KiB in the plain step"""  # noqa: E501


def test_as_text():
    def loss_fn(params, x):
        return jnp.mean(jnp.square(x @ params["w"] + params["b"][None, None]))

    params = {"b": draw(4), "unused": draw(4), "w": draw(6, 4)}
    fn = explain(loss_fn, directions=2)
    explanation = fn(params, draw(4, 16, 6))
    line = str(loss_fn.__code__.co_firstlineno + 1)
    assert str(explanation).replace(line, "#" * len(line)) == TINY
    assert str(explanation) == str(fn(params, draw(4, 16, 6)))


def test_as_a_table_of_rich():
    def loss_fn(params, x):
        return jnp.mean(jnp.tanh(x @ params["[bold]"]["w"] + params["b"][None, None]))

    params = {"[bold]": {"w": draw(6, 4)}, "b": draw(4), "[red]": draw(1)}
    explanation = explain(loss_fn, directions=3)(params, draw(4, 16, 6))
    console = rich.console.Console(width=200, record=True, file=io.StringIO())
    console.print(explanation)
    text = console.export_text()
    assert "┏" in text
    for use in explanation.uses:
        assert use.parameter in text
    told = [route for use in explanation.uses for route in (use.route, use.late_route)]
    told += [norm.route for norm in explanation.norms.parameters]
    assert len(told) == 6
    for route in ("tangent", "features"):  # "rows" is a word of other columns, too
        assert text.count(route) == told.count(route) > 0
    *_, summary = str(explanation).split("\n\n")
    assert summary in text


@pytest.mark.parametrize(
    ("amount", "base", "expected"),
    [
        (0, 1000, "0 "),
        (999, 1000, "999 "),
        (1000, 1000, "1.00 k"),
        (12345, 1000, "12.3 k"),
        (123456789, 1000, "123 M"),
        (999600, 1000, "1.00 M"),
        (1023, 1024, "1.00 Ki"),
        (3 << 20, 1024, "3.00 Mi"),
        (10**21, 1000, "1000000 P"),
    ],
)
def test_units(amount, base, expected):
    assert in_units(amount, base) == expected
