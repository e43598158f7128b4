"""Quality and speed of a checkpoint, measured: the context tower alone (AR) against both towers (diffusion)."""
