"""Ports: free ones are given, taken ones are refused by name."""

from __future__ import annotations

import socket

import pytest

from twotower.errors import PortInUse
from twotower.rpc.address import check_port, join_address, listening_socket


def test_a_free_port() -> None:
    with listening_socket("127.0.0.1", 0, "--port") as sock, socket.create_connection(sock.getsockname(), timeout=5):
        pass


def test_a_port_that_is_taken() -> None:
    with listening_socket("127.0.0.1", 0, "--port") as sock:
        port = sock.getsockname()[1]
        with pytest.raises(PortInUse, match=rf"127\.0\.0\.1:{port} \(--http-port\): Address already in use"):
            check_port("127.0.0.1", port, "--http-port")
    check_port("127.0.0.1", port, "--http-port")


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 65536), ("127.0.0.1", -1), ("192.0.2.1", 0)])
def test_addresses_that_are_not_ours(host: str, port: int) -> None:
    with pytest.raises(PortInUse, match=rf"{port} \(--port\)"):
        check_port(host, port, "--port")


def test_ipv6_hosts_get_brackets() -> None:
    assert join_address("::1", 5) == "[::1]:5"
    assert join_address("localhost", 5) == "localhost:5"
