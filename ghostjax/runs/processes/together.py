"""Joining the processes of a run, and leaving them."""

import atexit
import collections
import contextlib
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ghostjax.runs.errors import UsageError
from ghostjax.runs.processes import gathering, tunnel
from ghostjax.runs.processes.collective import are_several, is_first, meet
from ghostjax.runs.processes.watch import Watch

_PORT, _NAME = 4, 64  # bytes
# A tunnel's threads are Python's, which code that does not let go of the interpreter holds up.
_HEARTBEAT = 600  # seconds without one, after which JAX ends all; a watch does that at once

_WATCHES: list[Watch] = []


@contextlib.contextmanager
def together(
    coordinator: str | None, count: int | None, index: int | None, detect: bool
) -> Iterator[None]:
    """Joins the processes of a run, where there are several, and leaves them.

    Where JAX was initialized for that, the processes belong together until they end.

    Args:
      coordinator, count, index: as ``jax.distributed.initialize`` has them; ``detect``: as the
        cluster says. Without all of these, it is one process, or JAX was initialized before.

    Raises:
      UsageError: there are no others to join.
      StoppedError: one of the others ended.
    """
    is_own = (coordinator is not None or detect) and not jax.distributed.is_initialized()
    if is_own:
        atexit.register(_end)
        if coordinator is not None and count > 1:
            _initialize_through_tunnels(coordinator, count, index)
        else:
            _initialize(coordinator, count, index)
    if not are_several():
        yield
        return
    try:
        _check_devices()
        if all(watch.is_over for watch in _WATCHES):
            _WATCHES.append(_watch_what_is_initialized())
        yield
        meet("farewell")
        if not is_own:
            _WATCHES[-1].part()
    except BaseException as error:
        if _WATCHES:
            _WATCHES[-1].abandon(error)
        raise


def part() -> None:
    """Says farewell to the other processes, where all of them are about to end with an error."""
    if _WATCHES and not _WATCHES[-1].is_over:
        meet("farewell")
        _WATCHES[-1].part()


def check_same(digests: Mapping[str, str]) -> None:
    """Raises ``UsageError`` where what should be the same in all processes is not, naming it.

    Args:
      digests: hexadecimal, of equal lengths, by what they are of.
    """
    if not are_several():
        return
    own = np.array([list(bytes.fromhex(digest)) for digest in digests.values()], np.uint8)
    found = multihost_utils.process_allgather(own)  # [processes, digests, bytes]
    for name, each in zip(digests, np.moveaxis(found, 1, 0)):
        others = np.flatnonzero((each != each[0]).any(1))
        if others.size:
            part()
            raise UsageError(f"{name} of process {others[0]} are not those of process 0")


def has_joined() -> bool:
    """Whether this process has been one of several."""
    return bool(_WATCHES)


def _end() -> None:
    """The last farewell is said when JAX has said its own: until then a lost process is missed."""
    if any(watch.is_abandoned for watch in _WATCHES):
        # The others have ended: JAX would wait for them, and then abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    jax.distributed.shutdown()
    for watch in _WATCHES:
        watch.part()


def _initialize_through_tunnels(coordinator: str, count: int, index: int) -> None:
    host, _, port = coordinator.rpartition(":")
    address = host.strip("[]"), int(port)
    if index == 0:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(gathering.open_server(address[1], count))
            _WATCHES.append(Watch(0, gathering.gather(server, count)))
            stack.pop_all()  # open as long as the process
        entrance = service = tunnel.open_exit(server)
    else:
        _WATCHES.append(Watch(index, {0: gathering.join(address, index, count)}))
        entrance, service = tunnel.open_entrance(address), None
    try:
        _initialize(
            entrance,
            count,
            index,
            coordinator_bind_address=service,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except BaseException as error:
        _WATCHES[-1].abandon(error)
        raise


def _initialize(coordinator: str | None, count: int | None, index: int | None, **how: Any) -> None:
    # Its handler of SIGTERM would take the place of the run's own.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index, shutdown_timeout_seconds=30, **how)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        way_out = (
            "give --coordinator, --num-processes and --process-id"
            if coordinator is None
            else "call it before anything of JAX is, and see that the coordinator can be reached"
        )
        raise UsageError(f"jax.distributed.initialize: {reason}; {way_out}") from error


def _check_devices() -> None:
    """Raises ``UsageError``, in all processes, where one has more devices than another."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    different = [index for index in counts if counts[index] != counts[0]]
    if different:
        for watch in _WATCHES:
            watch.part()
        raise UsageError(
            f"process {different[0]} has {counts[different[0]]} devices, process 0 {counts[0]}: "
            "give all processes the same number"
        )


def _watch_what_is_initialized() -> Watch:
    """The first process says where it listens, by JAX's own means."""
    index, count = jax.process_index(), jax.process_count()
    server = gathering.open_server(0, count) if is_first() else None
    where = np.zeros(_PORT + _NAME, np.uint8)
    port = server.getsockname()[1] if server else 0
    encoded = port.to_bytes(_PORT, "big") + _own_address().encode()[:_NAME]
    where[: len(encoded)] = list(encoded)
    where = multihost_utils.broadcast_one_to_all(where).astype(np.uint8).tobytes()
    address = where[_PORT:].rstrip(b"\0").decode(), int.from_bytes(where[:_PORT], "big")
    if server is None:
        return Watch(index, {0: gathering.join(address, index, count)})
    with server:
        return Watch(index, gathering.gather(server, count))


def _own_address() -> str:
    """Of the interface that leads to other hosts; of none, that of the loop."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody's; nothing is sent
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
