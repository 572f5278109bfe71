"""What a tunnel passes on, and what it keeps from JAX."""

import contextlib
import socket
import time

import pytest

from ghostjax.runs.processes import gathering, tunnel


def address_of(text):
    host, _, port = text.rpartition(":")
    return host, int(port)


@pytest.fixture
def ends():
    """The client's end of a tunnel and the service's."""
    server = gathering.open_server(0, 4)
    service = address_of(tunnel.open_exit(server))
    entrance = address_of(tunnel.open_entrance(("127.0.0.1", server.getsockname()[1])))
    client = socket.create_connection(entrance)
    with client, socket.create_server(service) as listening:  # later than the client
        found, _ = listening.accept()
        with found:
            client.settimeout(10)
            found.settimeout(10)
            yield client, found


def received(connection, count):
    data = b""
    while len(data) < count:
        data += connection.recv(count - len(data))
    return data


def test_bytes_pass_both_ways(ends):
    client, service = ends
    data = bytes(range(256)) * 1000
    for one, other in ((client, service), (service, client)):
        one.sendall(data)
        assert received(other, len(data)) == data


def test_a_client_that_ends_is_missed_at_once(ends):
    client, service = ends
    client.close()
    assert service.recv(1) == b""


def test_a_client_is_not_told_at_once_that_its_service_is_gone(ends):
    client, service = ends
    service.close()
    client.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.recv(1)


def test_a_client_is_told_at_last(monkeypatch):
    monkeypatch.setattr(tunnel, "_HELD", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as first:
        entrance = address_of(tunnel.open_entrance(first.getsockname()))
        with socket.create_connection(entrance, timeout=10) as client:
            connection, _ = first.accept()
            assert gathering.first_words(connection) == b"ghostjax tunnel"
            begin = time.monotonic()
            connection.close()
            assert client.recv(1) == b""
            assert time.monotonic() - begin > 0.4


def test_who_comes_late_is_told():
    server = gathering.open_server(0, 4)
    tunnel.open_exit(server)
    address = "127.0.0.1", server.getsockname()[1]
    with pytest.raises(gathering.UsageError, match="are all there, each --process-id has been"):
        gathering.join(address, 1, 2)
    with contextlib.closing(socket.create_connection(address)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        stranger.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
