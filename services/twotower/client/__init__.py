"""An async client of the public gRPC API: `async with GatewayClient("127.0.0.1:50051") as client`."""

from twotower.client.grpc_client import GatewayClient, ModelInfo

__all__ = ["GatewayClient", "ModelInfo"]
