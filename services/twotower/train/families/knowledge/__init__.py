"""Questions about the facts of a small closed world, with four choices or free answers, some of them over two hops."""
