"""The prefix cache: states after prompt prefixes that repeat, so that a prompt is read from where it is new."""
