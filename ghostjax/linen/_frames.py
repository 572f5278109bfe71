"""Frames: every method call of a module during one abstract run of the loss function.

The loss is traced on shapes alone, twice, with N and with 2N rows. Whatever axis has doubled
indexes rows: nothing is inferred from an axis being in front or having a familiar size.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ghostjax._errors import ELSEWHERE, BatchError, RowAxisError, UnsupportedModuleError
from ghostjax.linen._boxes import ParameterBox, is_box, is_leaf

SCOPE = "ghostjax_frame_"
MARKER = "ghostjax_output_"


@dataclasses.dataclass
class Frame:
    """One method call. Shapes are those the module sees, inside all transforms around it."""

    index: int
    parent: int | None
    module: nn.Module  # a copy that holds no traced values
    path: tuple[str, ...]
    method: str
    args: tuple  # arrays as ShapeDtypeStruct, everything else as it is
    kwargs: dict
    boxes: dict[str, "BoxView"]  # by parameter path
    names: dict[str, str]  # path -> name, of the parameters the module itself owns
    repeatable: bool  # whether the method can be called again by its name
    outputs: list[jax.ShapeDtypeStruct] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        path = "/".join(self.path) or "the outermost module"
        return f"{type(self.module).__name__}.{self.method} ({path})"

    @property
    def key(self) -> tuple:
        return (self.path, type(self.module).__name__, self.method)

    @property
    def inputs(self) -> list[Any]:
        """The leaves of ``(args, kwargs)``."""
        return jax.tree.leaves((self.args, self.kwargs))


@dataclasses.dataclass(frozen=True)
class BoxView:
    """A parameter as one call sees it: the axes that transforms have taken off, and its shape."""

    lifted: tuple
    shape: tuple[int, ...]


def is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _shapes(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else leaf, tree
    )


def box_parameters(params: Any, carried: dict[str, Any], token: object) -> Any:
    """Boxes every parameter, with ``carried[path]`` beside it (nothing where there is none)."""

    def box(key_path, value):
        path = jax.tree_util.keystr(key_path)
        return ParameterBox(value, carried.get(path, ()), path, (), token)

    return jax.tree_util.tree_map_with_path(box, params, is_leaf=is_leaf)


def module_boxes(module: nn.Module) -> dict[str, ParameterBox]:
    """The boxes of a bound module and its submodules, by parameter path."""
    leaves = jax.tree.leaves(module.variables, is_leaf=is_box)
    return {leaf.path: leaf for leaf in leaves if is_box(leaf)}


class _FrameRecorder:
    """Interceptor that notes every call and marks its outputs in the jaxpr."""

    def __init__(self):
        self.frames: list[Frame] = []
        self._open: list[int] = []

    def __call__(self, next_fun, args, kwargs, context):
        module = context.module
        boxes = module_boxes(module)
        _refuse_mixing_modules(context, args, kwargs)
        if not boxes:  # not ours: a jitted call of it may be cached, and not be met every time
            return next_fun(*args, **kwargs)
        if next_fun is not context.orig_method:
            raise UnsupportedModuleError(
                f"{type(module).__name__}.{context.method_name} ({'/'.join(module.path)}) runs "
                "under an interceptor of the loss function's own (nn.intercept_methods), which may "
                "change what the module computes. Make the change in the module instead."
            )
        own = module.variables.get("params", {})
        names = {box.path: name for name, box in own.items() if is_box(box)}
        if len(names) < sum(map(is_box, own.values())):
            names = {}  # one parameter under two names: no rule tells them apart
        frame = Frame(
            index=len(self.frames),
            parent=self._open[-1] if self._open else None,
            module=module.clone(parent=None),
            path=module.path,
            method=context.method_name,
            args=_shapes(args),
            kwargs=_shapes(kwargs),
            boxes={
                path: BoxView(box.lifted, jnp.shape(box.array())) for path, box in boxes.items()
            },
            names=names,
            repeatable=_is_repeatable(context),
        )
        self.frames.append(frame)
        _refuse_changed_weights(frame)
        self._open.append(frame.index)
        try:
            with jax.named_scope(f"{SCOPE}{frame.index}"):
                outputs = next_fun(*args, **kwargs)
        finally:
            self._open.pop()
        leaves, treedef = jax.tree.flatten(outputs)
        for position, leaf in enumerate(leaves):
            if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact):
                marker = f"{MARKER}{frame.index}_{len(frame.outputs)}"
                leaves[position] = checkpoint_name(leaf, marker)
                frame.outputs.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.tree.unflatten(treedef, leaves)


def _refuse_changed_weights(frame: Frame) -> None:
    if isinstance(frame.module, (nn.WeightNorm, nn.SpectralNorm)):
        raise UnsupportedModuleError(
            f"{frame.name} changes the parameters of another module before that module uses them, "
            "so that their per-row gradients cannot be captured there. Normalize the weights "
            "inside the module that owns them."
        )


def _is_repeatable(context) -> bool:
    """Not so for ``super().__call__`` and for functions under a lifted transform."""
    found = getattr(type(context.module), context.method_name, None)
    running = context.orig_method.func
    return found is not None and inspect.unwrap(found) is inspect.unwrap(running)


def _refuse_mixing_modules(context, args, kwargs) -> None:
    module = context.module
    if not isinstance(module, nn.BatchNorm) or context.method_name != "__call__":
        return
    given = args[1] if len(args) > 1 else kwargs.get("use_running_average")
    if not nn.merge_param("use_running_average", module.use_running_average, given):
        raise RowAxisError(
            f"BatchNorm.__call__ ({'/'.join(module.path)}) is in training mode: it mixes the rows "
            "of a batch, so that no row has a gradient of its own (and validation rows would leak "
            "into training). Use LayerNorm or GroupNorm, or use_running_average=True."
        )


@dataclasses.dataclass
class Trace:
    """One abstract run: its frames, and the jaxpr whose first inputs are the parameters."""

    frames: list[Frame]
    jaxpr: Any
    paths: list[str]


def trace_frames(loss_fn: Callable, params: Any, batch: Any, args, kwargs) -> Trace:
    """Runs ``loss_fn`` on shapes, under the recorder, and checks that it returns [N] losses."""
    recorder = _FrameRecorder()
    token = object()

    def run(params, batch):
        boxed = box_parameters(params, {}, token)
        with nn.intercept_methods(recorder):
            return loss_fn(boxed, batch, *args, **kwargs)

    jaxpr, losses = jax.make_jaxpr(run, return_shape=True)(params, batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    found = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", losses)
    if not (is_array(losses) and losses.shape == (rows,)):
        raise BatchError(
            f"loss_fn must return one loss per row, an array of shape ({rows},). Found {found}. "
            "Average each row over its positions, but not over rows."
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"loss_fn must return floating-point losses. Found {found}.")
    # A parameter in a box of the user's is one leaf, as that box holds one array.
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
    ]
    return Trace(recorder.frames, jaxpr.jaxpr, paths)


def trace_at_two_sizes(loss_fn, params, batch, args, kwargs) -> tuple[Trace, Trace]:
    """The run with N rows, and the one with 2N rows that shows which axes index rows."""

    def shapes(factor):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (leaf.shape[0] * factor, *leaf.shape[1:]), leaf.dtype
            ),
            batch,
        )

    trace = trace_frames(loss_fn, params, shapes(1), args, kwargs)
    rows = jax.tree.leaves(batch)[0].shape[0]
    try:
        doubled = trace_frames(loss_fn, params, shapes(2), args, kwargs)
    except Exception as error:
        raise RowAxisError(
            f"loss_fn could be traced with {rows} rows but not with {2 * rows}, which is how row "
            "axes are told from others. Everything with a row axis must come in through batch, and "
            f"loss_fn must take any number of rows. {ELSEWHERE} The error was: {error}"
        ) from error
    if [frame.key for frame in trace.frames] != [frame.key for frame in doubled.frames]:
        raise RowAxisError(
            f"loss_fn calls different modules for {rows} and for {2 * rows} rows. It must treat "
            f"every row alike, whatever their number. {ELSEWHERE}"
        )
    return trace, doubled


LOST = -1


def row_axis(shape: tuple[int, ...], doubled: tuple[int, ...], rows: int) -> int | None:
    """The axis that indexes rows; None where there are none; LOST where they share an axis.

    ``doubled`` is the shape of the same value with 2 ``rows`` rows instead of ``rows``.
    """
    if shape == doubled:
        return None
    if len(shape) != len(doubled):
        return LOST
    grown = [axis for axis in range(len(shape)) if shape[axis] != doubled[axis]]
    if len(grown) == 1 and (shape[grown[0]], doubled[grown[0]]) == (rows, 2 * rows):
        return grown[0]
    return LOST
