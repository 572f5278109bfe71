"""Processes find each other, or each ends with a line that says why not. All in threads here."""

import contextlib
import json
import socket
import threading

import pytest

from ghostjax.runs.errors import StoppedError, UsageError
from ghostjax.runs.processes import gathering


@pytest.fixture
def server():
    with gathering.open_server(0, 4) as server:
        yield server


@pytest.fixture
def address(server):
    return "127.0.0.1", server.getsockname()[1]


class Ends:
    """What becomes of the processes, by their numbers: a result or an error."""

    def __init__(self):
        self.found = {}
        self._threads = []

    def start(self, name, call, *args):
        def run():
            try:
                self.found[name] = call(*args)
            except Exception as error:
                self.found[name] = error

        self._threads.append(threading.Thread(target=run))
        self._threads[-1].start()

    def wait(self):
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.found


def assert_all(found, kind, text):
    for name, error in found.items():
        assert type(error) is kind, (name, error)
        assert text in str(error), (name, error)


def greet(address, *, count=3, **changes):
    words = gathering._greeting(1, 3).removeprefix(b"ghostjax process ")
    said = {**json.loads(words), "count": count, **changes}
    connection = socket.create_connection(address)
    connection.sendall(b"ghostjax process " + json.dumps(said).encode() + b"\n")
    return connection


def test_all_go_on_when_the_last_has_come(server, address):
    ends = Ends()
    ends.start(0, gathering.gather, server, 3)
    for index in (2, 1):
        ends.start(index, gathering.join, address, index, 3)
    found = ends.wait()
    assert sorted(found[0]) == [1, 2]
    for index in (1, 2):
        found[index].sendall(b"%d" % index)
        assert found[0][index].recv(1) == b"%d" % index
        found[0][index].close()
        found[index].close()


def test_who_waits_says_for_whom_and_not_for_ever(server, address, monkeypatch, capfd):
    monkeypatch.setattr(gathering, "PATIENCE", 0.3)
    monkeypatch.setattr(gathering, "LIMIT", 1.0)
    ends = Ends()
    ends.start(0, gathering.gather, server, 4)
    ends.start(2, gathering.join, address, 2, 4)
    found = ends.wait()
    told = f"process 0 waited 1 s at port {address[1]} for processes 1, 3 of 4: start all"
    assert_all(found, UsageError, told)
    lines = capfd.readouterr().err.splitlines()
    where = f"process 0 of the run at 127.0.0.1:{address[1]}"
    assert sorted(lines) == [
        f"ghostjax: process 0 waits at port {address[1]} for processes 1, 3 of 4, for 1 s at most",
        f"ghostjax: process 2 waits, with {where}, for others",
    ]


@pytest.mark.parametrize(
    ("name", "reason"), [("127.0.0.1", "Connection refused"), ("nobody.invalid", "")]
)
def test_nobody_listens(monkeypatch, capfd, name, reason):
    monkeypatch.setattr(gathering, "PATIENCE", 0.2)
    monkeypatch.setattr(gathering, "LIMIT", 0.5)
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UsageError) as raised:
        gathering.join((name, port), 1, 2)
    assert f"process 1 waited 0 s for process 0 of the run at {name}:{port} (" in str(raised.value)
    assert reason in str(raised.value)
    assert "--coordinator names the host of process 0" in str(raised.value)
    assert capfd.readouterr().err.startswith("ghostjax: process 1 waits for process 0 of the run ")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"count": 2}, "process 1 has --num-processes 2, process 0 3"),
        ({"index": 2}, "two processes have --process-id 2: give each its own, from 0 on"),
        ({"index": 0}, "two processes have --process-id 0: give each its own, from 0 on"),
        ({"versions": "ghostjax 0.0"}, "process 1 runs ghostjax 0.0; process 0 ghostjax "),
    ],
)
def test_processes_of_another_run(server, address, changes, text):
    with greet(address, index=2) as waiting, greet(address, **changes) as other:
        with pytest.raises(UsageError) as raised:
            gathering.gather(server, 3)
        assert text in str(raised.value)
        for connection in (waiting, other):
            said = connection.makefile().read()
            assert said == f"ghostjax refusal 2 {raised.value}"
            assert_all({0: gathering._refused(said.encode(), "")}, UsageError, text)


def test_strangers_are_sent_away(server, address, monkeypatch):
    monkeypatch.setattr(gathering, "_AT_ONCE", 0.2)
    with (
        socket.create_connection(address) as silent,
        socket.create_connection(address) as browser,
        greet(address, index="x") as broken,
        greet(address, index=2),
        greet(address),
    ):
        browser.sendall(b"GET / HTTP/1.1\r\n\r\n")
        found = gathering.gather(server, 3)
        assert sorted(found) == [1, 2]
        for connection in (silent, browser, broken):
            with contextlib.suppress(ConnectionResetError):  # with words that nobody read
                assert connection.recv(1) == b""
        for connection in found.values():
            connection.close()


@pytest.mark.parametrize("is_killed", [True, False])
def test_one_that_ends_while_it_waits_ends_all(server, address, is_killed):
    with greet(address, index=2, count=4) as waiting, greet(address, count=4) as other:
        told = gathering.lost(1)
        if not is_killed:
            told = gathering.ended(1, KeyboardInterrupt())
            assert told == "process 1 of the run ended: KeyboardInterrupt"
            other.sendall(told.encode())
        other.shutdown(socket.SHUT_WR)
        with pytest.raises(StoppedError) as raised:
            gathering.gather(server, 4)
        assert str(raised.value) == told
        assert waiting.makefile().read() == f"ghostjax refusal 1 {told}"


def test_the_first_is_killed_while_others_wait(server, address):
    ends = Ends()
    for index in (1, 2):
        ends.start(index, gathering.join, address, index, 3)
    for _ in (1, 2):
        server.accept()[0].close()
    assert_all(ends.wait(), StoppedError, gathering.lost(0))


def test_the_first_is_interrupted_while_others_wait(server, address, monkeypatch):
    def interrupted(connection, index):
        assert (connection.recv(1), index) == (b"x", 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(gathering, "_check_end", interrupted)
    with greet(address, index=2, count=4) as waiting:
        waiting.sendall(b"x")
        with pytest.raises(KeyboardInterrupt):
            gathering.gather(server, 4)
        told = "process 0 of the run ended: KeyboardInterrupt"
        assert waiting.makefile().read() == f"ghostjax refusal 1 {told}"


def test_something_else_answers(server, address):
    ends = Ends()
    ends.start(1, gathering.join, address, 1, 2)
    with server.accept()[0] as connection:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        text = f"what answers is not process 0 of the run at 127.0.0.1:{address[1]}: give the port"
        assert_all(ends.wait(), UsageError, text)


def test_a_port_that_is_not_to_be_had(server, address):
    port = address[1]
    with pytest.raises(UsageError, match=f"process 0 cannot listen on port {port} \\("):
        gathering.open_server(port, 1)
