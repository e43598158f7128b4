"""The prefix cache: states after prompt prefixes that repeat, so that the prefill of a prompt starts where it is new."""
