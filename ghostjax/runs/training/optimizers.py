"""Optimizers by name: any alias of optax or optax.contrib, with its arguments."""

import ast
import inspect
import re
from typing import Any

import jax
import optax
import optax.contrib

from ghostjax import directions
from ghostjax.runs.errors import UsageError
from ghostjax.runs.training.gradients import silent_micro_steps

# What they do to a coordinate depends on its own gradients, value and state.
_ADAMS = frozenset(["adabelief", "adam", "adamax", "adamaxw", "adamw", "amsgrad", "radam", "yogi"])
ALIKE = _ADAMS | {"adadelta", "adagrad", "rmsprop", "sgd"}


def make_schedule(peak: float, steps: int) -> optax.Schedule:
    """Warm-up over a fifth of the steps, then cosine decay to a tenth of the peak.

    No step has learning rate zero: its examples would get scores of zero whatever they hold. The
    warm-up is long because the first gradients are by far the largest and much alike for all data;
    at a high learning rate, an example's score would depend on when it is visited first.
    """
    warmup = max(1, steps // 5)
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=peak / 10,
    )
    return lambda count: schedule(count + 1)


def make_optimizer(
    text: str, schedule: Any, clip: float, params: Any
) -> optax.GradientTransformation:
    """``adamw(b2=0.95, weight_decay=0.1)``, or just ``adamw``, after clipping the gradient's norm.

    Those of ``optax.contrib`` are named like ``contrib.muon``. The learning rate is ``schedule``.
    ``clip`` 0 does not clip. ``params`` are the parameters, or their shapes.

    Raises:
      UsageError: optax has no such optimizer, it does not take these arguments, or no scores go
        through it.
    """
    name, arguments = parse_optimizer(text)
    home, _, own_name = name.rpartition(".")
    alias = getattr(optax.contrib if home else optax, own_name, None)
    known = inspect.isfunction(alias) and "learning_rate" in inspect.signature(alias).parameters
    if not known:
        raise UsageError(f"--optimizer: optax has no optimizer {name!r} with a learning rate")
    try:
        optimizer = alias(learning_rate=schedule, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--optimizer {name}: {' '.join(str(error).split())}") from error
    if clip:
        optimizer = optax.chain(optax.clip_by_global_norm(clip), optimizer)
    check_optimizer(optimizer, params, f"--optimizer {name}")
    return optimizer


def check_optimizer(optimizer: optax.GradientTransformation, params: Any, where: str) -> None:
    """Raises ``UsageError`` where no scores go through an optimizer of these parameters."""

    def direction(params):
        state = optimizer.init(params)
        return directions.through_optimizer(optimizer, state, params, params, params)

    try:
        with silent_micro_steps():
            jax.eval_shape(direction, params)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from error


def treats_alike(text: str) -> bool:
    """Whether an optimizer by name does the same with all coordinates; clipping by the norm of all
    of them may come before it."""
    name, arguments = parse_optimizer(text)
    trees = (dict, list, tuple)  # say what is done with which array
    return name in ALIKE and not any(isinstance(own, trees) for own in arguments.values())


def parse_optimizer(text: str) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments, which must be literals.

    >>> parse_optimizer("adamw(b2=0.95, nesterov=True)")
    ('adamw', {'b2': 0.95, 'nesterov': True})
    >>> parse_optimizer("contrib.muon")
    ('contrib.muon', {})

    Raises:
      UsageError: it is not of that form, or sets the learning rate.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        name = ast.unparse(call.func)
        if not re.fullmatch(r"(contrib\.)?\w+", name) or call.args:
            raise ValueError
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        if None in arguments:
            raise ValueError
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise UsageError(
            f"--optimizer {text!r}: expected a name, or a name with arguments such as "
            "'adamw(b2=0.95, weight_decay=0.1)'"
        ) from None
    if "learning_rate" in arguments:
        raise UsageError("--optimizer: the learning rate is set with --learning-rate")
    return name, arguments
