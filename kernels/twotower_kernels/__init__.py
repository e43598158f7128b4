"""The computations that decide speed, each with a plain torch form. They depend on nothing but tensors."""
