"""The end of another process of the run is the end of this one, with one line that says why."""

import contextlib
import os
import socket
import threading
import time

from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.processes.gathering import ended, lost, say

_FAREWELL = b"\0"
_NOTICED = 2.0  # seconds, within which the end of another process is
_KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a host that is gone


class Watch:
    """Ends this process when another one of the run ends.

    Args:
      index: of this process.
      others: connections by the numbers of their processes: of the first all, of others the first.
    """

    def __init__(self, index: int, others: dict[int, socket.socket]):
        self.index = index
        self.is_over = False
        self.is_abandoned = False  # ended by an error of this process
        self._others = others
        self._is_ending = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        for other, connection in others.items():
            connection.settimeout(None)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEP_ALIVE.items():
                if hasattr(socket, name):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            listening = {"target": self._listen, "args": (other, connection), "daemon": True}
            self._threads.append(threading.Thread(**listening))
        for thread in self._threads:
            thread.start()

    def _listen(self, index: int, connection: socket.socket) -> None:
        said = b""
        with contextlib.suppress(OSError):
            while chunk := connection.recv(4096):
                said += chunk
        with self._lock:
            if said == _FAREWELL or self.is_over:
                return
            self.is_over = True
            self._is_ending.set()
        text = said.decode(errors="replace") or lost(index)
        self._tell(text)
        say(f"error: {text}")
        self._wait_for_others()
        os._exit(1)

    def part(self) -> None:
        """Says farewell: what becomes of the others is theirs from now on."""
        with self._lock:
            if self.is_over:
                return
            self.is_over = True
        self._tell(_FAREWELL.decode())
        self._wait_for_others()

    def abandon(self, error: BaseException) -> None:
        """Ends the others, who tell the error. Does not return where theirs came first."""
        if not isinstance(error, (UsageError, StoppedError, KeyboardInterrupt)):
            time.sleep(_NOTICED)  # what JAX says of another one that ended
        with self._lock:
            mine = not self.is_over
            self.is_over = True
        if mine:
            self.is_abandoned = True
            self._tell(ended(self.index, error))
            self._wait_for_others()
        while self._is_ending.is_set():
            time.sleep(_NOTICED)  # a thread is about to end the process

    def _tell(self, text: str) -> None:
        for connection in self._others.values():
            with contextlib.suppress(OSError):
                connection.sendall(text.encode())
                connection.shutdown(socket.SHUT_WR)

    def _wait_for_others(self) -> None:
        """So that the first, on whom JAX's own connections hang, is the last to end."""
        if self.index == 0:
            for thread in self._threads:
                if thread is not threading.current_thread():
                    thread.join(_NOTICED)
