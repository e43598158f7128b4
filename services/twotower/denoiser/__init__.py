"""The denoiser worker: pulls sessions, refines their blocks. It keeps nothing that cannot be lost."""
