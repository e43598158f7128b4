"""Facts of a small closed world, asked as four-way choices and as free answers, some of them over two hops."""
