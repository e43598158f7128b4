"""GPU kernels in Triton. Each agrees with a plain torch form beside it; without a GPU they run in Triton's interpreter."""
