"""Measures quality and speed of a checkpoint: the context tower alone (AR) against both towers (diffusion)."""
