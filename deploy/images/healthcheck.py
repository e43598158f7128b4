"""Exits with 0 if the service of this container works: it answers `liveness` on its gRPC port.

One that drains, or finds nobody yet, works. The port and the address are the service's own settings.
"""

from __future__ import annotations

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 5.0
ANY = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
DEFAULT_PORT = "50051"


def target(environ: dict[str, str]) -> str:
    """`host:port` of the service whose settings these are."""
    host = environ.get("TWOTOWER_HOST", "")
    host = ANY.get(host, host)
    port = environ.get("TWOTOWER_GRPC_PORT") or environ.get("TWOTOWER_PORT") or DEFAULT_PORT
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def main() -> int:
    """0, or 1 and the reason."""
    with grpc.insecure_channel(target(dict(os.environ))) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="liveness"), timeout=TIMEOUT_S
            )
        except grpc.RpcError as error:
            print(f"no answer: {error.code().name}", file=sys.stderr)
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main())
