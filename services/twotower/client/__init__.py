"""An async client of the public gRPC API."""
