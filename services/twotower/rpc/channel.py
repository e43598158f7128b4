"""How one service dials another."""

from __future__ import annotations

import grpc

MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""Enough for frame batches of 2 MiB, and for a prompt of 262,144 ids, with room to spare."""

KEEPALIVE_MS = 3_000
KEEPALIVE_TIMEOUT_MS = 5_000
"""A peer that is stopped or has vanished is given up after both together: a worker's slots wait for its context that long."""

ChannelOptions = tuple[tuple[str, int | str], ...]


def keepalive(every_ms: int, timeout_ms: int) -> ChannelOptions:
    """Ping the peer while calls are open: one that is stopped, or whose machine has vanished, never closes its connection.

    gRPC's own limit for the answer to a ping, of a minute, holds beside the one for keepalive: both are set.
    """
    return (
        ("grpc.keepalive_time_ms", every_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.http2.max_pings_without_data", 0),
    )


SIZE_OPTIONS: ChannelOptions = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

CHANNEL_OPTIONS: ChannelOptions = (
    *SIZE_OPTIONS,
    *keepalive(KEEPALIVE_MS, KEEPALIVE_TIMEOUT_MS),
    # A restarted peer should be found again within about a second, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Addresses are those of our own services, so no proxy of the environment is used, and channels share no
    # subchannels, whose backoff would be shared too.
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to `host:port`. It connects on first use; close it with `await channel.close(None)`."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
