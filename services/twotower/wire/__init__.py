"""Conversion between our types and the messages of proto/: tensors as frames, parameters. No sockets, no sessions."""
