"""The command line: parses options into configs, calls one function, and prints. It has no other logic."""
