"""The command line: parses flags into configs, calls one function, prints. No logic of its own."""
