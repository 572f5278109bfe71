"""What public functions of a loss have in common: it is traced once, with labels, and then used."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ghostjax._labels import check_labels
from ghostjax._loss import check_coupled, check_reduction, trace_loss


def on_loss(
    loss_fn: Callable[..., Any],
    run: Callable[..., Any],
    *,
    keywords: Sequence[str] = (),
    trace: Callable[..., Any] = trace_loss,
    loss_reduction: str,
    coupled: str = "error",
    **options: Any,
) -> Callable[..., Any]:
    """``fn(*args, labels=None, num_labels=None, **kwargs)``, called like the loss otherwise.

    It returns ``run(loss, arrays, labels)``, which also gets ``keywords``, none with a default.
    """
    check_reduction(loss_reduction)
    check_coupled(coupled)
    options |= {"loss_reduction": loss_reduction, "coupled": coupled}

    @functools.wraps(loss_fn)
    def fn(*args: Any, labels: Any = None, num_labels: int | None = None, **kwargs: Any) -> Any:
        own = {name: kwargs.pop(name) for name in keywords if name in kwargs}
        loss, arrays = trace(loss_fn, args, kwargs, **options)
        return run(loss, arrays, check_labels(loss, labels, num_labels), **own)

    fn.__signature__ = _signature(loss_fn, keywords)  # jax.jit looks for donated names there
    return fn


def _signature(loss_fn: Callable[..., Any], keywords: Sequence[str]) -> inspect.Signature:
    """That of the loss, with keywords of which labels alone have defaults."""
    kind = inspect.Parameter
    try:
        parameters = [*inspect.signature(loss_fn).parameters.values()]
    except (TypeError, ValueError):  # some callables have none
        parameters = [kind("args", kind.VAR_POSITIONAL), kind("kwargs", kind.VAR_KEYWORD)]
    own = dict.fromkeys(keywords, kind.empty) | {"labels": None, "num_labels": None}
    parameters = [found for found in parameters if found.name not in own]
    parameters += [kind(name, kind.KEYWORD_ONLY, default=value) for name, value in own.items()]
    return inspect.Signature(sorted(parameters, key=lambda found: found.kind))
