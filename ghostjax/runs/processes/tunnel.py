"""JAX's connections to its coordination service, led through ours.

The service lives in process 0. Where that is killed, a client of JAX that sees its connection end
writes a page of its own and aborts, in less time than any thread of Python has to say better what
happened. So the clients are connected to a socket of their own process, which stays open for a
while whatever becomes of process 0; what they say is passed on to the coordinator's port, and there
to the service. Nothing is read or changed on the way.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from ghostjax.runs.errors import UsageError
from ghostjax.runs.processes import gathering

_HELD = 30.0  # seconds, for which a client is not told that its service is gone
_SERVED = 60.0  # seconds, within which the service is there
_LOOP = "127.0.0.1"
_WORDS = b"ghostjax tunnel"
_CHUNK = 2**16


def open_entrance(address: gathering.Address) -> str:
    """An address in this process, for JAX; what connects to it is connected to process 0's."""
    server = socket.create_server((_LOOP, 0))

    def reach() -> socket.socket:
        connection = socket.create_connection(address, timeout=_SERVED)
        connection.sendall(_WORDS + b"\n")
        return connection

    _start(_accept, server, lambda client: _join(client, reach, _HELD))
    return _text(server)


def open_exit(server: socket.socket) -> str:
    """An address for JAX's service, to which the server passes on what comes through tunnels."""
    with socket.create_server((_LOOP, 0)) as free:
        service = free.getsockname()

    def reach() -> socket.socket:
        limit = time.monotonic() + _SERVED
        while True:
            try:
                return socket.create_connection(service)
            except OSError:
                if time.monotonic() > limit:
                    raise
                time.sleep(0.02)

    def take(connection: socket.socket) -> None:
        words = gathering.first_words(connection)
        if words == _WORDS:
            _join(connection, reach, 0.0)
        elif gathering.is_greeting(words):
            late = "the processes of this run are all there, each --process-id has been given"
            gathering.refuse([connection], UsageError(late))
        else:
            connection.close()

    _start(_accept, server, take)
    return f"{_LOOP}:{service[1]}"


def _accept(server: socket.socket, take: Callable[[socket.socket], None]) -> None:
    while True:
        connection, _ = server.accept()
        _start(take, connection)


def _join(one: socket.socket, reach: Callable[[], socket.socket], held: float) -> None:
    """Passes on between two connections until both have ended."""
    with one:
        try:
            other = reach()
        except OSError:
            time.sleep(held)
            return
        with other:
            for connection in (one, other):
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = _start(_pass_on, other, one, held)
            _pass_on(one, other, 0.0)
            back.join()


def _pass_on(source: socket.socket, sink: socket.socket, held: float) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(_CHUNK):
            sink.sendall(chunk)
    time.sleep(held)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def _text(server: socket.socket) -> str:
    return f"{_LOOP}:{server.getsockname()[1]}"


def _start(target: Callable[..., None], *args: object) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, daemon=True)
    thread.start()
    return thread
