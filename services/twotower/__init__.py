"""Serving system for two-tower diffusion language models."""

__version__ = "0.1.0"
