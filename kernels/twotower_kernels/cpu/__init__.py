"""Our own kernels for CPUs with AVX-512 BF16, compiled on first use. On other CPUs plain torch runs."""
