"""Addresses to listen on: written as gRPC reads them, and checked before use, with the operating system's own messages."""

from __future__ import annotations

import socket

from twotower.errors import PortInUse


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listening_socket(host: str, port: int, option: str) -> socket.socket:
    """A TCP socket that listens on `host:port` (0: any free port), not shared with another process.

    `option`: the setting that names the port, for the message. Raises PortInUse.
    """
    if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
        raise PortInUse(f"cannot listen on {join_address(host, port)} ({option}): a port is at most 65535")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind, proto)
        try:
            # A port in TIME_WAIT after an earlier connection is free; one that a process listens on is not.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen()  # two sockets may bind a port, but the second to listen is refused
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise PortInUse(f"cannot listen on {join_address(host, port)} ({option}): {error.strerror}") from None
    return sock


def check_port(host: str, port: int, option: str) -> None:
    """Raise PortInUse if `host:port` cannot be listened on now."""
    listening_socket(host, port, option).close()
