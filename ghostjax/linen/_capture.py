"""Capture: the interceptor of the pass that is differentiated.

It runs every module as it is and puts a channel behind each call that the plan names. The channel's
backward pass makes, from the call's operands and output cotangents, the gradient of the training
rows and whatever the parameter's task asks for.
"""

import contextlib
import functools
from typing import Any

import jax

from ghostjax._channel import channel
from ghostjax._errors import UnsupportedModuleError
from ghostjax.linen._boxes import is_box
from ghostjax.linen._calls import Call, Operands, make_call, split_outputs
from ghostjax.linen._frames import module_boxes
from ghostjax.linen._plan import Plan
from ghostjax.linen._records import contract
from ghostjax.linen._tasks import Task


class Capture:
    """For one run of the loss, with the plan's frames met again in the same order."""

    def __init__(self, plan: Plan, tasks: dict[str, Task], num_rows: int, num_train: int):
        self.plan = plan
        self.tasks = tasks
        self.num_rows = num_rows
        self.num_train = num_train
        self._met = 0
        self._paused = False

    def __call__(self, next_fun, args, kwargs, context):
        if self._paused:
            return next_fun(*args, **kwargs)
        module = context.module
        boxes = module_boxes(module)
        if not boxes:
            return next_fun(*args, **kwargs)
        index, self._met = self._met, self._met + 1
        key = (module.path, type(module).__name__, context.method_name)
        if self.plan.frame_keys[index : index + 1] != (key,):
            raise UnsupportedModuleError(
                f"loss_fn called {type(module).__name__}.{context.method_name} "
                f"({'/'.join(module.path)}) where an earlier trace with the same shapes called "
                "another module. It must make the same calls every time it is traced, and take no "
                "gradient itself."
            )
        unit = self.plan.units.get(index)
        if unit is None:
            return next_fun(*args, **kwargs)

        carried = {
            path: (boxes[path].carried["gradient"], boxes[path].carried["taps"][index])
            for path in unit.paths
        }
        with self._pause():
            call, operands = make_call(
                module, context.method_name, unit, self.num_rows, self.num_train, args, kwargs
            )
        before = _mutable_leaves(module)
        outputs, rebuild = split_outputs(next_fun(*args, **kwargs))
        after = _mutable_leaves(module)
        if len(after) != len(before) or any(new is not old for new, old in zip(after, before)):
            raise UnsupportedModuleError(
                f"{unit.frame.name} owns parameters and writes variables in the same call, which "
                "cannot be made again for a part of the rows. Split it into a module that owns the "
                "parameters and one that writes, or apply the model with mutable=False."
            )
        if not call.sliceable:
            # Random numbers must be the same in the forward and in the backward pass.
            with self._pause():
                outputs = call(operands)
        backward = functools.partial(_backward, call, self.tasks, self.num_train)
        return rebuild(channel(backward, outputs, carried, operands))

    def check_complete(self) -> None:
        """After the run: every call of the plan has been met."""
        if self._met != len(self.plan.frame_keys):
            raise UnsupportedModuleError(
                f"loss_fn made {self._met} calls of modules where an earlier trace with the same "
                f"shapes made {len(self.plan.frame_keys)}. It must make the same calls every time."
            )

    @contextlib.contextmanager
    def _pause(self):
        self._paused = True
        try:
            yield
        finally:
            self._paused = False


def _mutable_leaves(module) -> list[Any]:
    """The arrays of the collections a module could write to and read from, parameters apart.

    Flax hands out the same array until another is written. What is sown is never read back.
    """
    return [
        leaf
        for collection, variables in module.variables.items()
        if collection != "intermediates" and module.is_mutable_collection(collection)
        for leaf in jax.tree.leaves(variables, is_leaf=is_box)
        if not is_box(leaf)
    ]


def _backward(call: Call, tasks: dict[str, Task], num_train: int, operands: Operands, cotangents):
    gradients = call.total(operands, cotangents, 0, num_train)
    sources = _sources(call, num_train, operands, cotangents)
    return {
        path: (gradients[path], tasks[path].cotangent(sources[path])) for path in call.unit.paths
    }


def _sources(call: Call, num_train: int, operands: Operands, cotangents):
    unit = call.unit
    records = {}
    if unit.rule is not None:
        records = unit.rule(
            operands.inputs[0], cotangents[0], unit.input_axes[0], unit.output_axes[0]
        )
    differentiated = _Differentiated(call, num_train, operands, cotangents)
    return {
        path: _RecordSource(records[name], num_train)
        if (name := unit.frame.names.get(path)) in records
        else _CallSource(path, differentiated)
        for path in unit.paths
    }


class _RecordSource:
    """A parameter that the module's rule has a record of."""

    def __init__(self, record, num_train):
        self._record = record
        self._num_train = num_train

    def dots(self):
        return contract([self._record], self._num_train)

    def record(self):
        return self._record

    def per_row(self):
        return self._record.per_row()


class _Differentiated:
    """A module differentiated for the parameters its rule leaves out, when asked."""

    def __init__(self, call, num_train, operands, cotangents):
        self._args = (operands, cotangents)
        self._call = call
        self._num_train = num_train

    @functools.cached_property
    def dots(self):
        return self._call.contract(*self._args, self._num_train)

    @functools.cached_property
    def per_row(self):
        return self._call.per_row(*self._args)


class _CallSource:
    """One parameter of a differentiated module."""

    def __init__(self, path, shared: _Differentiated):
        self._path = path
        self._shared = shared

    def dots(self):
        return self._shared.dots[self._path]

    def record(self):
        raise NotImplementedError("only modules with a rule have records")

    def per_row(self):
        return self._shared.per_row[self._path]
