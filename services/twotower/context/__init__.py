"""The context service: sessions, their state, and the frozen tower that extends it. It starts no denoising."""
