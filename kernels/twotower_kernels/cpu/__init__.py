"""Our own kernels for CPUs with AVX-512 BF16, compiled on first use; elsewhere there are none, and torch computes."""
