"""The computations that decide speed, each with a plain torch form. They know tensors and nothing else."""
