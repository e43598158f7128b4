"""Small Python functions from a signature and a docstring, scored by hidden assertions that run in a sandbox."""
