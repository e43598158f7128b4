"""Text to token ids and back, also piece by piece. No model, no network."""
