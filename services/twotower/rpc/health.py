"""`grpc.health.v1` with a bound on watches, since a watch lasts as long as its client likes, whether it is read or not."""

from __future__ import annotations

from typing import Any

from grpc_health.v1 import _async as health
from grpc_health.v1 import health_pb2

from twotower.errors import Overloaded

CHECK = "/grpc.health.v1.Health/Check"

MAX_WATCHES = 100


class HealthServicer(health.HealthServicer):  # type: ignore[misc]
    """The library's servicer, with bounded watches."""

    def __init__(self) -> None:
        super().__init__()
        self._watches = 0

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """Stream the status. Raises Overloaded."""
        if self._watches >= MAX_WATCHES:
            raise Overloaded(f"{MAX_WATCHES} clients watch the health of this server already; use Check")
        self._watches += 1
        try:
            await super().Watch(request, context)
        finally:
            self._watches -= 1
