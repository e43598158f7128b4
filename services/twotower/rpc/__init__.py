"""How services listen, dial and stop: one gRPC server and channel setup, and errors across the wire. No model, no Redis."""
