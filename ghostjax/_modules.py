"""Modules given as parameters: what of them is differentiated, and how the rest is put back.

No library is imported here: what is an instance of a library's class has imported it before.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax

from ghostjax._errors import ParameterError

NNX_LINES = """\
  graphdef, params, rest = nnx.split(model, nnx.Param, ...)  # and inside the loss
  model = nnx.merge(graphdef, params, rest, copy=True)"""
EQUINOX_LINES = """\
  params, static = eqx.partition(model, eqx.is_inexact_array)  # and inside the loss
  model = eqx.combine(params, static)"""


def opened(arg: Any) -> tuple[Any, Callable[[Any], tuple[Any, Callable[[], None]]]]:
    """The parameters in ``arg``: of an Equinox module those of ``eqx.filter_grad``, of an NNX
    module those of ``nnx.grad``, and all of anything else.

    Returns:
      (params, close), where ``close(params)`` is the argument again, and a check to be made when
      the loss has been called with it.
    """
    if _is_of(arg, "equinox", "Module"):
        eqx = sys.modules["equinox"]
        params, static = eqx.partition(arg, eqx.is_inexact_array)
        return params, lambda params: (eqx.combine(params, static), lambda: None)
    if _is_of(arg, "flax.nnx", "Module"):
        return _opened_nnx(arg, sys.modules["flax.nnx"])
    return arg, lambda params: (params, lambda: None)


def _opened_nnx(module: Any, nnx: Any):
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def close(params):
        model = nnx.merge(graphdef, params, rest, copy=True)

        def state():
            found = nnx.state(model, nnx.Not(nnx.Param))
            return dict(jax.tree_util.tree_leaves_with_path(found))

        before = state()

        def check():
            """``nnx.grad`` would carry a change out of the loss, which a pure function cannot."""
            names = [
                f"  {jax.tree_util.keystr(path)}"
                for path, leaf in state().items()
                if leaf is not before.get(path)
            ]
            if names:
                raise ParameterError(
                    "loss_fn changes state of the module that is given as parameters, and the "
                    "change would be lost:\n" + "\n".join(names) + "\nPass its parameters, with "
                    f"the rest as a further argument, and return new state as aux:\n{NNX_LINES}"
                )

        return model, check

    return params, close


def two_lines(tree: Any) -> str:
    """How the parameters of the modules in ``tree`` are split off, or nothing if it has none."""
    of_nnx = [("flax.nnx", name) for name in ("Module", "State", "Variable")]
    found = ""
    for lines, kinds in ((NNX_LINES, of_nnx), (EQUINOX_LINES, [("equinox", "Module")])):

        def is_module(node, kinds=kinds):
            return any(_is_of(node, *kind) for kind in kinds)

        if any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module))):
            found += f"\nSplit off the parameters of the module:\n{lines}"
    return found


def _is_of(node: Any, library: str, name: str) -> bool:
    return library in sys.modules and isinstance(node, getattr(sys.modules[library], name))
