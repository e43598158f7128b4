"""Between our nouns and the messages of proto/: frames for tensors, parameters. No sockets, no sessions."""
