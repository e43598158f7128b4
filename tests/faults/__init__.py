"""A whole stack under load while something goes wrong: every answer must be what it is in the calm, and nothing may be left."""
