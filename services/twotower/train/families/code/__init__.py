"""Small Python functions from a signature and a docstring, scored by running hidden assertions in a sandbox."""
