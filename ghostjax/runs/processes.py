"""Several processes that make one run together, one a host, as ``jax.distributed`` has them.

All of them make every step; the first writes what belongs to the whole run. None goes on without
the others: every process is connected to the first one, and a connection that ends without a
farewell ends the process, wherever its main thread is. (JAX itself takes a hundred seconds to
notice that, and ends with a stack trace.)
"""

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from ghostjax.runs.errors import UsageError

_FAREWELL = b"\0"
_NOTICED = 2.0  # seconds, within which the end of another process is
_CONNECTED = 60.0  # seconds, within which the processes are with each other
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a host that is gone
_INDEX, _PORT, _NAME = 4, 4, 64  # bytes


def are_several() -> bool:
    """Whether this is one of several processes. Before there are any, no device is asked for."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process writes what belongs to the whole run."""
    return not are_several() or jax.process_index() == 0


def meet(where: str) -> None:
    """Waits for all processes of the run to come to the same place."""
    if are_several():
        multihost_utils.sync_global_devices(where)


def largest(number: int) -> int:
    """The largest of the numbers that the processes give."""
    if not are_several():
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


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


@contextlib.contextmanager
def together(
    coordinator: str | None, count: int | None, index: int | None, detect: bool
) -> Iterator[None]:
    """Joins the processes of a run, where there are several, and leaves them.

    Args:
      coordinator, count, index: as ``jax.distributed.initialize`` has them; ``detect``: as the
        cluster says. Without all of these, it is one process, or JAX was initialized before.

    Raises:
      UsageError: there are no others to join.
    """
    if (coordinator is not None or detect) and not jax.distributed.is_initialized():
        _initialize(coordinator, count, index)
    if not are_several():
        yield
        return
    watch = _Watch(coordinator)
    try:
        yield
        watch.part()
    except BaseException as error:
        if isinstance(error, JaxRuntimeError):
            time.sleep(_NOTICED)  # it may be that another one ended
        watch.abandon(str(error) or type(error).__name__)
        raise


def part() -> None:
    """Says farewell to the other processes, where all of them are about to end with an error."""
    for watch in _WATCHES:
        watch.part()


def leave(code: int) -> None:
    """Ends a process that has left the others behind, at once: JAX would wait for them."""
    if _WATCHES and code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


_WATCHES: list["_Watch"] = []


def _initialize(coordinator: str | None, count: int | None, index: int | None) -> None:
    # Its handler of SIGTERM would take the place of the run's own.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(coordinator, count, index, shutdown_timeout_seconds=30)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        way_out = (
            "give --coordinator, --num-processes and --process-id"
            if coordinator is None
            else "call it before anything of JAX is, and see that the coordinator can be reached"
        )
        raise UsageError(f"jax.distributed.initialize: {reason}; {way_out}") from error


def _own_address() -> str:
    """Of the interface that leads to other hosts; of none, that of the loop."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737: nobody's; nothing is sent
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


class _Watch:
    """Ends this process when another one of the run ends."""

    def __init__(self, coordinator: str | None):
        self._others: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._is_over = False
        self._lock = threading.Lock()
        _WATCHES.append(self)
        name = _own_address() if coordinator is None else coordinator.rpartition(":")[0]
        server = socket.create_server(("", 0), backlog=jax.process_count()) if is_first() else None
        port = server.getsockname()[1] if server else 0
        where = np.zeros(_PORT + _NAME, np.uint8)
        encoded = port.to_bytes(_PORT, "big") + name.encode()[:_NAME]
        where[: len(encoded)] = list(encoded)
        where = multihost_utils.broadcast_one_to_all(where).astype(np.uint8).tobytes()
        name = where[_PORT:].rstrip(b"\0").decode().strip("[]")
        address = name, int.from_bytes(where[:_PORT], "big")
        try:
            self._accept(server) if server else self._connect(address)
        except OSError as error:
            raise UsageError(
                f"process {jax.process_index()}: no connection of process 0, at {name}:{address[1]}"
                f", with the others ({error}): open the ports between the hosts"
            ) from error

    def _accept(self, server: socket.socket) -> None:
        server.settimeout(_CONNECTED)
        with server:
            for _ in range(jax.process_count() - 1):
                connection, _ = server.accept()
                index = int.from_bytes(connection.recv(_INDEX, socket.MSG_WAITALL), "big")
                self._add(index, connection)

    def _connect(self, address: tuple[str, int]) -> None:
        connection = socket.create_connection(address, timeout=_CONNECTED)
        connection.sendall(jax.process_index().to_bytes(_INDEX, "big"))
        self._add(0, connection)

    def _add(self, index: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._others[index] = connection
        thread = threading.Thread(target=self._listen, args=(index, connection), daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen(self, index: int, connection: socket.socket) -> None:
        said = b""
        with contextlib.suppress(OSError):
            while chunk := connection.recv(4096):
                said += chunk
        with self._lock:
            if said == _FAREWELL or self._is_over:
                return
            self._is_over = True
        text = said.decode(errors="replace") or (
            f"process {index} of the run was lost: start all of them again, with --resume if the "
            "run had begun"
        )
        self._tell(text)
        os.write(2, f"ghostjax: error: {text}\n".encode())
        self._wait_for_others()
        os._exit(1)

    def part(self) -> None:
        """Says farewell, once all have come so far."""
        if self._is_over:
            return
        meet("farewell")
        self._is_over = True
        self._tell(_FAREWELL.decode())
        self._wait_for_others()

    def abandon(self, reason: str) -> None:
        """Ends the others, who tell the reason."""
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._tell(f"process {jax.process_index()} of the run ended: {reason}")
        self._wait_for_others()

    def _tell(self, text: str) -> None:
        for connection in self._others.values():
            with contextlib.suppress(OSError):
                connection.sendall(text.encode())
                connection.shutdown(socket.SHUT_WR)

    def _wait_for_others(self) -> None:
        """So that the first, on whom JAX's own connections hang, is the last to end."""
        if is_first():
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(_NOTICED)
