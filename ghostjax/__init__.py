"""Per-example gradient inner products for JAX, exact and at close to the cost of a plain step."""

import importlib
from typing import TYPE_CHECKING, Any

from ghostjax._extras import WITH_EXTRAS, with_extra

if TYPE_CHECKING:
    from ghostjax._extras import *  # noqa: F403
    from ghostjax._public import *  # noqa: F403
else:  # a type checker that saw it would take every name for one of the package

    def __getattr__(name: str) -> Any:
        """What is public, or a module of the package. The first one imports JAX and all of it.

        The package itself does not, so that its command line can tell of Ctrl-C while JAX is
        imported.
        """
        if name in WITH_EXTRAS:
            return with_extra(name)
        if not name.startswith("_"):
            public = vars(importlib.import_module("ghostjax._public"))
            for names in (public, globals()):
                if name in names:
                    return names[name]
        elif name == "__all__":
            public = vars(importlib.import_module("ghostjax._public"))
            return sorted(own for own in public if not own.startswith("_"))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__"), *WITH_EXTRAS})
