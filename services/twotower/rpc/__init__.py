"""How services listen, dial and stop: the setup of gRPC servers and channels, and errors on the wire. No model, no Redis."""
