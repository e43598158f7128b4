"""Reference pages that follow from the code: `python -m twotower.reference DIR` writes them, and tests compare them."""
