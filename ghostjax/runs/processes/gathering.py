"""How the processes of a run find each other: all others connect to the first one.

Each says which it is; what cannot be one run is refused before JAX, which would wait or crash, is
asked for anything. The first then lets all of them go on at once.
"""

import contextlib
import json
import os
import selectors
import socket
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from ghostjax.runs.errors import StoppedError, UsageError

LIMIT = 300.0  # seconds, within which all processes are started
PATIENCE = 10.0  # seconds, after which a process says for whom it waits

_GREETING = b"ghostjax process "
_WELCOME = b"ghostjax welcome\n"
_REFUSAL = b"ghostjax refusal "  # and the exit code, a space, the reason
_LONGEST = 4096  # bytes of a greeting
_AT_ONCE = 5.0  # seconds, within which who connects says what it is
_AGAIN = 0.2  # seconds between attempts to connect

Address = tuple[str, int]


def lost(index: int) -> str:
    """What is said where a process ended without a word."""
    return (
        f"process {index} of the run was lost: start all of them again, with --resume if the run "
        "had begun"
    )


def ended(index: int, error: BaseException) -> str:
    """What the others say where a process ended with an error."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"process {index} of the run ended: {reason}"


def say(text: str) -> None:
    """A line on stderr, from any thread, whatever Python's own buffers hold."""
    line = "".join(c if c.isprintable() else " " for c in text)
    with contextlib.suppress(OSError):
        os.write(2, f"ghostjax: {line}\n".encode(errors="backslashreplace"))


def open_server(port: int, backlog: int) -> socket.socket:
    """Listens on all interfaces, as JAX does.

    Raises:
      UsageError: the port is not to be had.
    """
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    try:
        options = both if socket.has_dualstack_ipv6() else {}
        return socket.create_server(("", port), backlog=backlog, **options)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(
            f"process 0 cannot listen on port {port} ({reason}): give another one, to all processes"
        ) from error


def gather(server: socket.socket, count: int) -> dict[int, socket.socket]:
    """Waits, as process 0 of ``count``, for the others; their connections by their numbers.

    Raises:
      UsageError: they did not come, or cannot be one run. All that came end, too.
      StoppedError: one of them ended before the last one came.
    """
    found: dict[int, socket.socket] = {}
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            for wait in _waits(LIMIT):
                missing = [str(index) for index in range(1, count) if index not in found]
                if not missing:
                    break
                who = f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {count}"
                port = server.getsockname()[1]
                if wait is None:
                    raise UsageError(
                        f"process 0 waited {LIMIT:.0f} s at port {port} for {who}: start all "
                        "within that time, and see that the port can be reached"
                    )
                if wait == "said":
                    say(f"process 0 waits at port {port} for {who}, for {LIMIT:.0f} s at most")
                for key, _ in selector.select(_AGAIN):
                    if key.fileobj is server:
                        _admit(server.accept()[0], count, found, selector)
                    else:
                        _check_end(key.fileobj, key.data)
        for connection in found.values():
            connection.sendall(_WELCOME)
    except OSError as error:
        reason = StoppedError(f"the processes of the run lost each other: {error}")
        refuse(found.values(), reason)
        raise reason from error
    except BaseException as error:
        refuse(found.values(), error)
        raise
    return found


def refuse(connections: Iterable[socket.socket], error: BaseException) -> None:
    """Ends those who wait to be let in, with the reason."""
    code = 2 if isinstance(error, UsageError) else 1
    text = str(error) if isinstance(error, (UsageError, StoppedError)) else ended(0, error)
    for connection in connections:
        with connection, contextlib.suppress(OSError):
            connection.sendall(_REFUSAL + f"{code} {text}".encode())


def join(address: Address, index: int, count: int) -> socket.socket:
    """Connects to process 0 and waits, as process ``index``, until all are there.

    Raises:
      UsageError: process 0 is not to be found, or refused it.
      StoppedError: another one ended before the last one came.
    """
    where = f"process 0 of the run at {address[0]}:{address[1]}"
    connection = _reach(address, where, index)
    try:
        connection.sendall(_greeting(index, count))
        _wait_for_welcome(connection, where, index)
        connection.settimeout(None)
        return connection
    except BaseException as error:
        with connection, contextlib.suppress(OSError):
            connection.sendall(ended(index, error).encode())
        if isinstance(error, OSError):
            raise StoppedError(lost(0)) from error
        raise


def _reach(address: Address, where: str, index: int) -> socket.socket:
    reason = "no answer"
    for wait in _waits(LIMIT):
        if wait is None:
            break
        if wait == "said":
            say(f"process {index} waits for {where} ({reason}), for {LIMIT:.0f} s at most")
        try:
            return _connect(address)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(_AGAIN)
    raise UsageError(
        f"process {index} waited {LIMIT:.0f} s for {where} ({reason}): start all within that time, "
        "and see that --coordinator names the host of process 0 and a port of it that can be "
        "reached"
    )


def _wait_for_welcome(connection: socket.socket, where: str, index: int) -> None:
    said = b""
    connection.settimeout(_AGAIN)
    for wait in _waits(LIMIT + PATIENCE):  # process 0 gives up first
        if wait is None:
            break
        if wait == "said":
            say(f"process {index} waits, with {where}, for others")
        try:
            heard = connection.recv(_LONGEST)
        except TimeoutError:
            continue
        said += heard
        if said == _WELCOME:
            return
        if not heard:
            raise _refused(said, where)
    raise UsageError(f"{where} did not answer: see that it is the port of a run")


def first_words(connection: socket.socket) -> bytes:
    """The line with which a connection begins, without its end; nothing where there is none."""
    words = b""
    connection.settimeout(_AT_ONCE)
    with contextlib.suppress(OSError):
        while not words.endswith(b"\n") and len(words) < _LONGEST:
            if not (byte := connection.recv(1)):
                return b""
            words += byte
    connection.settimeout(None)
    return words.removesuffix(b"\n") if words.endswith(b"\n") else b""


def _waits(limit: float) -> Iterator[str | None]:
    """Something again and again until the limit, once "said", after PATIENCE; then None."""
    begin, has_said = time.monotonic(), False
    while (passed := time.monotonic() - begin) < limit:
        if passed > PATIENCE and not has_said:
            has_said = True
            yield "said"
        yield ""
    yield None


def _connect(address: Address) -> socket.socket:
    connection = socket.create_connection(address, timeout=PATIENCE)
    # Where nobody listens on a port of this host, a connection may be given that port and so get
    # hold of itself.
    if connection.getsockname() == connection.getpeername():
        connection.close()
        raise ConnectionRefusedError(0, "Connection refused")
    return connection


def _greeting(index: int, count: int) -> bytes:
    said = {"index": index, "count": count, "versions": _versions()}
    return _GREETING + json.dumps(said).encode() + b"\n"


def _versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("ghostjax", "jax", "jaxlib"))


def _admit(
    connection: socket.socket, count: int, found: dict[int, socket.socket], selector: Any
) -> None:
    said = _read(first_words(connection))
    if said is None:  # somebody else, who tries what listens here
        connection.close()
        return
    index, problem = said["index"], None
    if said["count"] != count:
        problem = f"process {index} has --num-processes {said['count']}, process 0 {count}"
    elif index in found or index == 0:
        problem = f"two processes have --process-id {index}: give each its own, from 0 on"
    elif said["versions"] != _versions():
        problem = f"process {index} runs {said['versions']}; process 0 {_versions()}"
    if problem is not None:
        error = UsageError(problem)
        refuse([connection], error)
        raise error
    found[index] = connection
    selector.register(connection, selectors.EVENT_READ, index)


def _read(words: bytes) -> dict[str, Any] | None:
    """What a greeting says; None: it is none."""
    try:
        if not words.startswith(_GREETING):
            return None
        said = json.loads(words.removeprefix(_GREETING))
        return {"index": int(said["index"]), "count": said["count"], "versions": said["versions"]}
    except (ValueError, LookupError, TypeError):
        return None


def is_greeting(words: bytes) -> bool:
    return words.startswith(_GREETING)


def _check_end(connection: socket.socket, index: int) -> None:
    """One that waits has nothing to say but that it ends."""
    said = b""
    with contextlib.suppress(OSError):
        said = connection.recv(_LONGEST)
    raise StoppedError(said.decode(errors="replace") or lost(index))


def _refused(said: bytes, where: str) -> Exception:
    if not said:
        return StoppedError(lost(0))
    if not said.startswith(_REFUSAL):
        return UsageError(f"what answers is not {where}: give the port that is given to process 0")
    code, _, text = said.removeprefix(_REFUSAL).decode(errors="replace").partition(" ")
    return UsageError(text) if code == "2" else StoppedError(text)
