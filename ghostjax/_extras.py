"""Public names that need packages of an extra: imported when they are first asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ghostjax.runs.loop.run_log import RunLog as RunLog

WITH_EXTRAS = {"RunLog": "ghostjax.runs.loop.run_log"}


def with_extra(name: str) -> Any:
    """The public name.

    Raises:
      ImportError: a package is missing; says which extra has it.
    """
    try:
        return getattr(importlib.import_module(WITH_EXTRAS[name]), name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'ghostjax.{name} needs {error.name}: pip install "ghostjax[train]"'
        ) from error
