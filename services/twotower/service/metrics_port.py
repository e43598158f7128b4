"""The port on which a tower offers its metrics, if it is asked to."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server

from twotower.rpc.address import check_port

log = logging.getLogger(__name__)


@contextlib.contextmanager
def metrics_port(host: str, port: int | None, registry: CollectorRegistry) -> Iterator[None]:
    """Offer `registry` at ``http://host:port/metrics``; port: None: nowhere, 0: any free one. Raises PortInUse."""
    if port is None:
        yield
        return
    check_port(host, port, "--metrics-port")
    server, thread = start_http_server(port, host, registry)
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
